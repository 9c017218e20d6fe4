"""Files that are written once and read once, from start to end, and hashed on the way."""

from __future__ import annotations

import hashlib
import io
import mmap
import os
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from loopkit.errors import CorruptCheckpointError

CHUNK = 8 << 20
"""The most bytes that one read or write moves."""

Operation = Callable[..., AbstractContextManager[None]]
"""A store's context around one operation: it announces the operation and translates its errors."""


class _Hasher:
    """Computes the SHA-256 of large pieces in a thread, while the caller moves the next piece.

    At most one piece is in flight, so the caller may overwrite a piece as soon as it has handed
    over the next one.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pieces: queue.Queue[memoryview | None] | None = None

    def update(self, piece: memoryview) -> None:
        if self._pieces is None and (len(piece) < CHUNK or not self._start()):
            self._hash.update(piece)
        elif self._pieces is not None:
            self._pieces.join()
            self._pieces.put(piece)

    def hexdigest(self) -> str:
        if self._pieces is not None:
            self._pieces.join()
        return self._hash.hexdigest()

    def close(self) -> None:
        pieces, self._pieces = self._pieces, None
        if pieces is not None:
            pieces.join()
            pieces.put(None)

    def _start(self) -> bool:
        pieces: queue.Queue[memoryview | None] = queue.Queue()
        thread = threading.Thread(
            target=self._run, args=(pieces,), daemon=True, name="loopkit-hash"
        )
        try:
            thread.start()
        except RuntimeError:
            # A program that is shutting down starts no threads; its last save hashes in place.
            return False
        self._pieces = pieces
        return True

    def _run(self, pieces: queue.Queue[memoryview | None]) -> None:
        while (piece := pieces.get()) is not None:
            self._hash.update(piece)
            del piece
            pieces.task_done()


class FileWriter:
    """A file that is being written. Once closed it is durable, and its size and SHA-256 are known."""

    def __init__(self, operation: Operation, path: Path, handle: int, expected: int | None):
        self.path = path
        self.size = 0
        self._operation = operation
        self._handle = handle
        self._expected = expected
        self._hash = _Hasher()

    @property
    def sha256(self) -> str:
        """The SHA-256 of all bytes written, in hex."""
        return self._hash.hexdigest()

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
            self._hash.update(piece)
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
            self._hash.close()
            os.close(self._handle)


class FileReader:
    """A file that is read once from start to end, and hashed on the way if ``hashed``."""

    def __init__(self, operation: Operation, path: Path, handle: int, hashed: bool = True):
        self.path = path
        self.size = os.fstat(handle).st_size
        self._operation = operation
        self._file = io.FileIO(handle)
        self._hashed = hashed
        self._hash = _Hasher()
        self._scratch = [memoryview(b""), memoryview(b"")]

    @property
    def sha256(self) -> str:
        """The SHA-256 of all bytes read, in hex."""
        return self._hash.hexdigest()

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
            if self._hashed:
                self._hash.update(view[start : start + CHUNK])

    def read_piece(self, size: int) -> memoryview:
        """Return the next ``size`` bytes, at most :data:`CHUNK`.

        The memory is reused by the call after the next one.
        """
        self._scratch.reverse()
        if len(self._scratch[0]) < size:
            self._scratch[0] = memoryview(bytearray(size))
        piece = self._scratch[0][:size]
        self.read_into(piece)
        return piece

    def read_all(self, keep: bool = True) -> bytes:
        """Return the whole file. With ``keep=False`` only hash it, and return nothing."""
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
        self._hash.close()
        self._file.close()
