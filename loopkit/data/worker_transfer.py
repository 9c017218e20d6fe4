"""Batches from worker processes: their shared memory is handed over through sockets that stay open.

torch sends the descriptor of each tensor's shared memory over a connection of its own. To open that
takes half a millisecond of the training process, for each tensor of each batch
(docs/decisions/worker-transfer.md).
"""

from __future__ import annotations

import io
import os
import pickle
import socket
import weakref
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.utils.data import get_worker_info

from loopkit.errors import DataError

_MOST = 250  # descriptors in one message; Linux takes 253
_TOKEN = 16  # bytes
_receivers: dict[str, list[socket.socket]] = {}


class WorkerTransfer:
    """One socket for each worker process of a DataLoader, made before they start.

    A worker calls it with a batch that is about to be sent, and sends what is returned. In the
    process that made this object, the batch comes out of the DataLoader with the same tensors, in
    the same shared memory, as torch would give it.

    Args:
        num_workers: how many workers there are.
    """

    def __init__(self, num_workers: int) -> None:
        self._name = os.urandom(_TOKEN).hex()
        pairs = [socket.socketpair() for _ in range(num_workers)]
        self._senders = [sender for sender, _ in pairs]
        for _, receiver in pairs:
            receiver.setblocking(False)
        _receivers[self._name] = [receiver for _, receiver in pairs]
        self._process = b""
        self._sent = 0
        # Not at the interpreter's exit: a thread that pins memory may still take batches then.
        weakref.finalize(self, _close, self._name, self._senders).atexit = False

    def __call__(self, batch: Any) -> Any:
        """Return what to send in place of ``batch``; the batch itself goes torch's way.

        Raises:
            DataError: the batch cannot be pickled. torch would wait for it without end.
        """
        worker = get_worker_info()
        if worker is None:
            return batch
        file = io.BytesIO()
        pickler = _Pickler(file)
        try:
            pickler.dump(batch)
        except Exception as error:
            raise DataError(
                "a batch cannot be sent from a worker process, as it cannot be pickled: "
                f"{type(error).__name__}: {error}. Collate to tensors and plain values, or read "
                "without workers (num_workers=0)"
            ) from error
        if not 0 < len(pickler.fds) <= _MOST:
            return batch
        if not self._process:  # each process has a name, so that no batch is taken for another's
            self._process = os.urandom(_TOKEN // 2)
        self._sent += 1
        token = self._process + self._sent.to_bytes(_TOKEN // 2, "little")
        try:
            socket.send_fds(self._senders[worker.id], [token], pickler.fds, socket.MSG_DONTWAIT)
        except OSError:  # too many batches or descriptors are on their way
            return batch
        return _Sent(self._name, worker.id, token, pickler.sizes, file.getvalue())


def _close(name: str, senders: list[socket.socket]) -> None:
    for one in [*senders, *_receivers.pop(name)]:
        one.close()


def worker_transfer(num_workers: int) -> Callable[[Any], Any]:
    """Return what a worker does with a batch before it is sent: nothing where torch's way is wanted."""
    strategy = torch.multiprocessing.get_sharing_strategy()  # type: ignore[no-untyped-call]
    if not num_workers or strategy != "file_descriptor" or not hasattr(socket, "send_fds"):
        return _unchanged
    return WorkerTransfer(num_workers)


def _unchanged(batch: Any) -> Any:
    return batch


class _Pickler(ForkingPickler):
    """Pickles as torch does between processes, and collects the descriptors of shared memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.fds: list[int] = []
        self.sizes: list[int] = []
        self._seen: dict[int, int] = {}
        self._kept: list[torch.UntypedStorage] = []  # so that none's address is used again

    def persistent_id(self, part: Any) -> int | None:
        if type(part) is not torch.UntypedStorage or part.device.type != "cpu" or not part.nbytes():
            return None
        if part._cdata not in self._seen:
            fd, size = part._share_fd_cpu_()
            self._seen[part._cdata] = len(self.fds)
            self._kept.append(part)
            self.fds.append(fd)
            self.sizes.append(size)
        return self._seen[part._cdata]


class _Unpickler(pickle.Unpickler):
    def __init__(self, pickled: bytes, storages: list[torch.UntypedStorage]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._storages = storages

    def persistent_load(self, number: int) -> torch.UntypedStorage:
        return self._storages[number]


class _Sent:
    """A batch on its way: it is unpickled as the batch itself."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, self._parts


def _receive(name: str, worker: int, token: bytes, sizes: list[int], pickled: bytes) -> Any:
    fds = _receive_fds(_receivers[name][worker], token, worker)
    make: Any = torch.UntypedStorage
    storages: list[torch.UntypedStorage] = []
    try:
        for fd, size in zip(fds, sizes, strict=True):  # fewer arrive where no more may be open
            storages.append(make._new_shared_fd_cpu(fd, size))
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(
            f"worker {worker} sent {len(sizes)} tensors, of which this process could take "
            f"{len(storages)}: it may not open more files. Raise the limit (ulimit -n), or call "
            "torch.multiprocessing.set_sharing_strategy('file_system')"
        ) from error
    finally:
        for fd in fds:
            os.close(fd)
    return _Unpickler(pickled, storages).load()


def _receive_fds(receiver: socket.socket, token: bytes, worker: int) -> list[int]:
    """Return the descriptors that were sent with ``token``; those before are of an ended pass."""
    while True:
        try:
            found, fds, _, _ = socket.recv_fds(receiver, _TOKEN, _MOST)
        except BlockingIOError:
            raise RuntimeError(f"worker {worker} sent a batch without its tensors") from None
        if found == token:
            return list(fds)
        for fd in fds:
            os.close(fd)
