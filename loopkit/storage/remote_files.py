"""Remote: the files below one URL of a store. Tests count, fail or kill at any request."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from loopkit.errors import CorruptCheckpointError
from loopkit.files import write_file
from loopkit.storage.retries import Retries
from loopkit.storage.urls import child, open_filesystem

PIECE = 8 << 20
"""The most bytes of one request for a part of a file."""
_AT_ONCE = 4  # parts that are requested together

T = TypeVar("T")


@dataclass(frozen=True)
class Listed:
    """A file in a listing: its size in bytes, and when it was written, in seconds since 1970."""

    size: int
    modified: float


class Remote:
    """Reads and writes files below ``url``, by names such as ``checkpoints/latest``.

    A file appears whole or not at all. All methods but ``close`` raise what ``Retries.call``
    raises.

    Args:
        url: as ``as_url`` returns it.
        retries: how failures are met.
        filesystem: an fsspec file system; None opens the one of the URL.
    """

    def __init__(self, url: str, retries: Retries, filesystem: Any = None) -> None:
        self.url = url
        self.retries = retries
        self._files = filesystem if filesystem is not None else open_filesystem(url)
        self._root = str(self._files._strip_protocol(url)).rstrip("/")
        self._on_disk = url.startswith("file://")

    def with_retries(self, retries: Retries) -> Remote:
        """Return the same place with other retries."""
        return Remote(self.url, retries, self._files)

    def below(self, *names: str) -> Remote:
        """Return what lies below a folder."""
        return Remote(child(self.url, *names), self.retries, self._files)

    def find(self, folder: str = "") -> dict[str, Listed]:
        """Return all files below a folder, at any depth; nothing if there is none."""
        return self._call("list", folder, lambda: self._found(folder))

    def entries(self, folder: str = "") -> tuple[list[str], dict[str, Listed]]:
        """Return the names of the folders in a folder, and the files in it."""

        def listed() -> tuple[list[str], dict[str, Listed]]:
            self._files.invalidate_cache()
            try:
                entries = self._files.ls(self._path(folder), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return [], {}
            names = {str(each["name"]).rstrip("/").rpartition("/")[2]: each for each in entries}
            folders = sorted(name for name, each in names.items() if each["type"] == "directory")
            return folders, {n: _listed(e) for n, e in names.items() if e["type"] == "file"}

        return self._call("list", folder, listed)

    def read(self, name: str, limit: int) -> bytes:
        """Return the content of a file.

        Raises:
            FileNotFoundError: it is not there.
            CorruptCheckpointError: it has more than ``limit`` bytes.
        """
        path = self._path(name)
        data = self._call(
            "read", name, lambda: bytes(self._files.cat_file(path, start=0, end=limit + 1))
        )
        if len(data) > limit:
            raise CorruptCheckpointError(f"{child(self.url, name)}: more than {limit} bytes")
        return data

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """Yield a file of ``size`` bytes in pieces. A file that is shorter ends early."""
        for start in range(0, size, _AT_ONCE * PIECE):
            starts = range(start, min(size, start + _AT_ONCE * PIECE), PIECE)
            yield from self._call("read", name, partial(self._parts, name, starts, size))

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, in place of one that is there."""

        def put() -> None:
            if self._on_disk:
                write_file(self._local(name), [data], durable=True)
            else:
                self._files.pipe_file(self._path(name), data)

        self._call("write", name, put)

    def put_new(self, name: str, data: bytes) -> bool:
        """Write a small file that must not be there.

        Returns:
            False if a file with another content is there. The same content may be that of an
            earlier try, whose answer was lost.
        """

        def put() -> None:
            if not self._on_disk:
                self._files.pipe_file(self._path(name), data, mode="create")
                return
            path = self._local(name)
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            write_file(temporary, [data], durable=True)
            try:
                os.link(temporary, path)
            finally:
                temporary.unlink()

        try:
            self._call("write", name, put)
        except FileExistsError:
            return self.read(name, len(data) + 1) == data
        return True

    def put_file(self, name: str, path: Path) -> None:
        """Write the content of a local file, in place of one that is there."""

        def put() -> None:
            if not self._on_disk:
                self._files.put_file(str(path), self._path(name))
                return
            with open(path, "rb") as file:
                write_file(self._local(name), iter(lambda: file.read(PIECE), b""), durable=True)

        self._call("write", name, put)

    def copy(self, name: str, target: str) -> None:
        """Copy a file within the store."""
        paths = self._path(name), self._path(target)
        self._call("copy", name, lambda: self._files.cp_file(*paths))

    def remove(self, names: Sequence[str]) -> None:
        """Delete files, those that exist."""
        for name in names:
            with suppress(FileNotFoundError):
                self._call("delete", name, partial(self._files.rm_file, self._path(name)))

    def remove_empty(self, folder: str) -> None:
        """Delete a folder without files, where the store keeps such folders."""
        if not self._on_disk:
            return
        for inner, _, _ in os.walk(self._path(folder), topdown=False):
            with suppress(OSError):
                os.rmdir(inner)

    def _op(self, kind: str, name: str) -> None:
        """Hook for tests, called before each try of a request."""

    def _call(self, kind: str, name: str, function: Callable[[], T]) -> T:
        place = child(self.url, name) if name else self.url

        def one_try() -> T:
            self._op(kind, name)
            return function()

        return self.retries.call(one_try, f"{kind} {place}")

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _local(self, name: str) -> Path:
        path = Path(self._path(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _found(self, folder: str) -> dict[str, Listed]:
        self._files.invalidate_cache()
        try:
            found = self._files.find(self._path(folder), detail=True)
        except FileNotFoundError:
            return {}
        start = len(self._path(folder).lstrip("/")) + 1
        names = {path.lstrip("/")[start:]: entry for path, entry in found.items()}
        return {name: _listed(entry) for name, entry in names.items() if name}

    def _parts(self, name: str, starts: Sequence[int], size: int) -> list[bytes]:
        path = self._path(name)
        ends = [min(size, start + PIECE) for start in starts]
        found = self._files.cat_ranges([path] * len(ends), list(starts), ends, on_error="raise")
        return [bytes(each) for each in found]


def _listed(entry: dict[str, Any]) -> Listed:
    """Return what the listing of any store says of a file."""
    for key in ("LastModified", "mtime", "updated", "last_modified", "created"):
        when = entry.get(key)
        if isinstance(when, datetime):
            return Listed(int(entry["size"]), when.timestamp())
        if isinstance(when, (int, float)):
            return Listed(int(entry["size"]), float(when))
        if isinstance(when, str):
            with suppress(ValueError):
                return Listed(
                    int(entry["size"]),
                    datetime.fromisoformat(when.replace("Z", "+00:00")).timestamp(),
                )
    return Listed(int(entry["size"]), 0.0)
