"""Files that are written once and read once, from start to end, with a checksum on the way."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from loopkit.checkpoint import digests
from loopkit.checkpoint.digests import Digest
from loopkit.errors import CorruptCheckpointError

CHUNK = 8 << 20
"""The most bytes that one read or write moves."""

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

    @property
    def digest(self) -> str:
        """The checksum of all bytes written, see :mod:`loopkit.checkpoint.digests`."""
        return self._digest.text

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, in pieces of at most :data:`CHUNK`."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            wanted = self._expected if self._expected is not None else self.size + len(piece)
            with self._operation("write", self.path, extra=piece, wanted=wanted):
                rest = piece
                while rest:
                    rest = rest[os.write(self._handle, rest) :]
            self._digest.update(piece)
            self.size += len(piece)

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

    def read_into(self, view: memoryview) -> None:
        """Fill ``view``.

        Raises:
            CorruptCheckpointError: the file ends before.
        """
        for start in range(0, len(view), CHUNK):
            rest = view[start : start + CHUNK]
            with self._operation("read", self.path):
                while rest:
                    count = self._file.readinto(rest)
                    if not count:
                        raise CorruptCheckpointError(f"{self.path} ends early")
                    rest = rest[count:]
            if self._digest is not None:
                self._digest.update(view[start : start + CHUNK])

    def read_piece(self, size: int) -> memoryview:
        """Return the next ``size`` bytes, at most :data:`CHUNK`. The next call reuses the memory."""
        if len(self._scratch) < size:
            self._scratch = memoryview(bytearray(size))
        piece = self._scratch[:size]
        self.read_into(piece)
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
