"""Files written once and read once, from start to end, hashed on the way."""

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
"""Bytes moved by one read or write at most."""

NonFiniteGuard = Callable[..., AbstractContextManager[None]]
"""The store's door: what is done inside is counted before and its errors are translated."""


class _Hasher:
    """SHA-256 of large pieces in a thread of its own, while the caller reads or writes the next
    one.

    At most one piece is in flight: a piece may be changed once the one after the next is handed
    over.
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
        try:
            threading.Thread(
                target=self._run, args=(pieces,), daemon=True, name="loopkit-hash"
            ).start()
        except RuntimeError:
            # A program that is ending starts no threads; its last save goes on without.
            return False
        self._pieces = pieces
        return True

    def _run(self, pieces: queue.Queue[memoryview | None]) -> None:
        while (piece := pieces.get()) is not None:
            self._hash.update(piece)
            del piece
            pieces.task_done()


class Sink:
    """A file being written: size and SHA-256 are known when it is closed, and the bytes are
    durable.
    """

    def __init__(self, guard: NonFiniteGuard, path: Path, handle: int, expected: int | None):
        self.path = path
        self.size = 0
        self._guard = guard
        self._handle = handle
        self._expected = expected
        self._hash = _Hasher()

    @property
    def sha256(self) -> str:
        """Of all bytes written, in hex."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes, in pieces of at most :data:`CHUNK`."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), CHUNK):
            piece = view[start : start + CHUNK]
            wanted = self._expected if self._expected is not None else self.size + len(piece)
            with self._guard("write", self.path, extra=piece, wanted=wanted):
                rest = piece
                while rest:
                    rest = rest[os.write(self._handle, rest) :]
            self._hash.update(piece)
            self.size += len(piece)

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                with self._guard("sync", self.path, wanted=self._expected):
                    os.fsync(self._handle)
        finally:
            self._hash.close()
            os.close(self._handle)


class Source:
    """A file being read once from start to end, hashed on the way unless that is not wanted."""

    def __init__(self, guard: NonFiniteGuard, path: Path, handle: int, hashed: bool = True):
        self.path = path
        self.size = os.fstat(handle).st_size
        self._guard = guard
        self._file = io.FileIO(handle)
        self._hashed = hashed
        self._hash = _Hasher()
        self._scratch = [memoryview(b""), memoryview(b"")]

    @property
    def sha256(self) -> str:
        """Of all bytes read, in hex."""
        return self._hash.hexdigest()

    def read_into(self, view: memoryview) -> None:
        """Fill ``view``; ``CorruptCheckpointError`` when the file ends before."""
        for start in range(0, len(view), CHUNK):
            rest = view[start : start + CHUNK]
            with self._guard("read", self.path):
                while rest:
                    count = self._file.readinto(rest)
                    if not count:
                        raise CorruptCheckpointError(f"{self.path} ends early")
                    rest = rest[count:]
            if self._hashed:
                self._hash.update(view[start : start + CHUNK])

    def read_piece(self, size: int) -> memoryview:
        """The next bytes, at most :data:`CHUNK`, in memory that the call after the next one reuses."""
        self._scratch.reverse()
        if len(self._scratch[0]) < size:
            self._scratch[0] = memoryview(bytearray(size))
        piece = self._scratch[0][:size]
        self.read_into(piece)
        return piece

    def read_all(self, keep: bool = True) -> bytes:
        """The whole file; with ``keep=False`` it is hashed and dropped, and nothing is returned."""
        if keep:
            data = bytearray(self.size)
            self.read_into(memoryview(data))
            return bytes(data)
        for start in range(0, self.size, CHUNK):
            self.read_piece(min(CHUNK, self.size - start))
        return b""

    def map(self) -> mmap.mmap:
        """The file as memory; what is changed there stays there."""
        with self._guard("read", self.path):
            return mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_COPY)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._hash.close()
        self._file.close()
