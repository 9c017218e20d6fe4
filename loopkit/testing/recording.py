"""Recording of every file operation that Python code of this process does below a directory."""

from __future__ import annotations

import base64
import io
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from loopkit.testing.disk import Operation

_OPEN, _WRITE, _CLOSE = os.open, os.write, os.close


class Recorder:
    """Appends operations to a log file, which several processes may share.

    The paths of operations are absolute. Operations of libraries that write files from C or Rust
    are not seen.

    Args:
        root: operations below this directory are recorded, and those of the directory itself.
        log: the log file, outside of ``root``.
    """

    def __init__(self, root: Path, log: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self._log = _OPEN(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()
        self._files: dict[int, Path] = {}

    def note(self, kind: str, path: Path, extra: Any = None) -> None:
        """Record one operation that is done."""
        if isinstance(extra, bytes):
            extra = base64.b64encode(extra).decode()
        record = json.dumps([kind, str(path), str(extra) if isinstance(extra, Path) else extra])
        with self._lock:
            _WRITE(self._log, record.encode() + b"\n")

    def path(self, given: Any, dir_fd: int | None = None) -> Path | None:
        """Return the absolute path of an argument; None if it lies outside of the root."""
        if not isinstance(given, (str, bytes, os.PathLike)):
            return self._files.get(given) if isinstance(given, int) else None
        path = Path(os.fsdecode(given))
        if dir_fd is not None and dir_fd in self._files:
            path = self._files[dir_fd] / path
        path = Path(os.path.realpath(path.parent)) / path.name
        return path if path.is_relative_to(self.root) else None

    def opened(self, handle: int, path: Path) -> None:
        """Note which file a handle is of."""
        self._files[handle] = path

    def closed(self, handle: int) -> None:
        """Forget a handle."""
        self._files.pop(handle, None)


class _RecordedFile(io.FileIO):
    """A file that ``open`` returned for writing."""

    def __init__(self, recorder: Recorder, path: Path, mode: str) -> None:
        existed = path.exists()
        super().__init__(path, mode)
        self._recorder, self._path = recorder, path
        if not existed:
            recorder.note("create", path)
        elif "w" in mode:
            recorder.note("truncate", path, 0)
        recorder.opened(self.fileno(), path)

    def write(self, data: Any) -> int:
        written = super().write(data)
        self._recorder.note("write", self._path, bytes(memoryview(data).cast("B")[:written]))
        return written

    def truncate(self, size: int | None = None) -> int:
        kept = super().truncate(size)
        self._recorder.note("truncate", self._path, kept)
        return kept

    def close(self) -> None:
        if not self.closed:
            self._recorder.closed(self.fileno())
        super().close()


@contextmanager
def recording(root: Path, log: Path) -> Iterator[Recorder]:
    """Inside, the file operations of this process below ``root`` are appended to ``log``."""
    recorder = Recorder(root, log)
    with ExitStack() as patches:
        for name, function in _recorded(recorder).items():
            patches.enter_context(mock.patch.object(os, name, function))
        opener = _recorded_open(recorder)
        patches.enter_context(mock.patch("builtins.open", opener))
        patches.enter_context(mock.patch.object(io, "open", opener))
        yield recorder
    _CLOSE(recorder._log)


def read_log(log: Path) -> list[Operation]:
    """Return the operations that were recorded, in order."""
    kinds: dict[str, Callable[[str], Any]] = {"rename": Path, "write": base64.b64decode}
    with open(log, encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [
        (kind, Path(path), kinds[kind](extra) if kind in kinds else extra)
        for kind, path, extra in records
    ]


def _recorded(recorder: Recorder) -> dict[str, Callable[..., Any]]:
    """Return functions in place of those of ``os``, by name."""

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        found = recorder.path(path, dir_fd)
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        existed = found is None or found.exists()
        handle = _OPEN(path, flags, mode, dir_fd=dir_fd)
        if found is not None and (writes or stat.S_ISDIR(os.fstat(handle).st_mode)):
            if not existed:
                recorder.note("create", found)
            recorder.opened(handle, found)
        return handle

    def close(handle: int) -> None:
        recorder.closed(handle)
        _CLOSE(handle)

    def write(handle: int, data: Any) -> int:
        written = _WRITE(handle, data)
        if (path := recorder.path(handle)) is not None:
            recorder.note("write", path, bytes(memoryview(data).cast("B")[:written]))
        return written

    def on(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Record a function of one path, or of one handle."""

        def call(path: Any, *args: Any, dir_fd: int | None = None, **keywords: Any) -> Any:
            result = function(path, *args, **keywords, **({"dir_fd": dir_fd} if dir_fd else {}))
            if (found := recorder.path(path, dir_fd)) is not None:
                is_dir = kind == "sync" and stat.S_ISDIR(os.fstat(path).st_mode)
                extra = args[0] if kind == "truncate" else None
                recorder.note("sync_dir" if is_dir else kind, found, extra)
            return result

        return call

    def moved(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, target: Any, **keywords: Any) -> None:
            found, new = recorder.path(path), recorder.path(target)
            function(path, target, **keywords)
            if found is not None and new is not None:
                recorder.note("rename", found, new)

        return call

    kinds = {"mkdir": "mkdir", "unlink": "remove", "remove": "remove", "rmdir": "rmdir"}
    kinds |= {"fsync": "sync", "fdatasync": "sync", "ftruncate": "truncate"}
    changed = {name: on(kind, getattr(os, name)) for name, kind in kinds.items()}
    moves = {name: moved(getattr(os, name)) for name in ("rename", "replace")}
    return {"open": open_, "close": close, "write": write, **changed, **moves}


def _recorded_open(recorder: Recorder) -> Callable[..., Any]:
    """Return a function in place of the built-in ``open``."""
    original = io.open

    def open_(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        path = None if isinstance(file, int) or opener else recorder.path(file)
        if path is None or not set(mode) & set("wax+"):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _RecordedFile(recorder, path, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, buffering == 1)

    return open_
