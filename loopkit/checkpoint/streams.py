"""Files that are written once and read once, from start to end, with a checksum on the way."""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from loopkit.checkpoint import digests
from loopkit.checkpoint.digests import Digest
from loopkit.errors import CorruptCheckpointError

CHUNK = 8 << 20
"""The most bytes of one operation of a store."""

CACHED = 256 << 10
"""The bytes that are hashed at a time: a processor's cache holds them for the next checksum."""

WRITEBACK = 32 << 20
"""The bytes after which a writer asks the system to begin to move them to the disk."""

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_WRITE_RANGE = 2  # SYNC_FILE_RANGE_WRITE

Operation = Callable[..., AbstractContextManager[None]]
"""A store's context around one operation: it announces the operation and translates its errors."""


class FileWriter:
    """A file that is being written. Once closed it is durable; its size and digest are known."""

    def __init__(self, operation: Operation, path: Path, handle: int, expected: int | None):
        self.path = path
        self.size = 0
        self._operation = operation
        self._handle = handle
        self._expected = expected
        self._digest = Digest(digests.FILE)
        self._started = 0

    @property
    def digest(self) -> str:
        """The checksum of all bytes written, see :mod:`loopkit.checkpoint.digests`."""
        return self._digest.text

    def write(self, data: bytes | memoryview, digest: Digest | None = None) -> None:
        """Append bytes, and give them to ``digest`` too.

        One operation of the store writes at most :data:`CHUNK` bytes.
        """
        view = memoryview(data).cast("B")
        into = [self._digest] if digest is None else [self._digest, digest]
        for start in range(0, len(view), CHUNK):
            chunk = view[start : start + CHUNK]
            wanted = self._expected if self._expected is not None else self.size + len(chunk)
            with self._operation("write", self.path, extra=chunk, wanted=wanted):
                for piece in _pieces(chunk):
                    _update(into, piece)
                rest = chunk
                while rest:  # writes of a cached piece take longer together than one of a chunk
                    rest = rest[os.write(self._handle, rest) :]
            self.size += len(chunk)
            self._start_writeback()

    def _start_writeback(self) -> None:
        """Let Linux move bytes to the disk from now on, so that the sync at the end is short.

        This promises nothing, and other systems do without it. See sync_file_range(2).
        """
        start_range = getattr(_LIBC, "sync_file_range", None)
        size = self.size - self._started
        if start_range is None or size < WRITEBACK:
            return
        start_range(self._handle, ctypes.c_int64(self._started), ctypes.c_int64(size), _WRITE_RANGE)
        self._started = self.size

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._operation("sync", self.path, wanted=self._expected):
                    os.fsync(self._handle)
        finally:
            os.close(self._handle)


class FileReader:
    """A file that is read once from start to end. What is read goes into ``digest`` if it is given."""

    def __init__(self, operation: Operation, path: Path, handle: int, digest: Digest | None = None):
        self.path = path
        self.size = os.fstat(handle).st_size
        self._operation = operation
        self._file = io.FileIO(handle)
        self._digest = digest
        self._scratch = memoryview(b"")

    def read_into(self, view: memoryview, digest: Digest | None = None) -> None:
        """Fill ``view``, and give its bytes to ``digest`` too.

        Raises:
            CorruptCheckpointError: the file ends before.
        """
        into = [each for each in (self._digest, digest) if each is not None]
        for start in range(0, len(view), CHUNK):
            with self._operation("read", self.path):
                for piece in _pieces(view[start : start + CHUNK]):
                    self._fill(piece)
                    _update(into, piece)

    def _fill(self, rest: memoryview) -> None:
        while rest:
            count = self._file.readinto(rest)
            if not count:
                raise CorruptCheckpointError(f"{self.path} ends early")
            rest = rest[count:]

    def read_piece(self, size: int, digest: Digest | None = None) -> memoryview:
        """Return the next ``size`` bytes, at most :data:`CHUNK`. The next call reuses the memory."""
        if len(self._scratch) < size:
            self._scratch = memoryview(bytearray(size))
        piece = self._scratch[:size]
        self.read_into(piece, digest)
        return piece

    def read_all(self, keep: bool = True) -> bytes:
        """Return the whole file. With ``keep=False`` only read it, and return nothing."""
        if keep:
            data = bytearray(self.size)
            self.read_into(memoryview(data))
            return bytes(data)
        for start in range(0, self.size, CHUNK):
            self.read_piece(min(CHUNK, self.size - start))
        return b""

    def map(self) -> mmap.mmap:
        """Return the file as memory. Changes to the memory do not reach the file."""
        with self._operation("read", self.path):
            return mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_COPY)

    def __enter__(self) -> FileReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _pieces(view: memoryview) -> Iterator[memoryview]:
    """Yield ``view`` in pieces of :data:`CACHED` bytes."""
    for start in range(0, len(view), CACHED):
        yield view[start : start + CACHED]


def _update(into: list[Digest], piece: memoryview) -> None:
    for digest in into:
        digest.update(piece)
