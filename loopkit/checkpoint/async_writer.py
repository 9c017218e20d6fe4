"""Saving while training continues: a step waits only until its tensors are copied into buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from loopkit.checkpoint.node_disks import NodeDisks, write_on_nodes
from loopkit.checkpoint.safetensors_io import find_aliases
from loopkit.checkpoint.sharded_writer import write_sharded
from loopkit.checkpoint.snapshot import Shard, Snapshot
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.writer import PendingCheckpoint, prepare, write_checkpoint

if TYPE_CHECKING:
    from loopkit.distributed.communicator import Communicator


class BackgroundWriter:
    """Writes checkpoints in one thread, at most one at a time.

    The buffers take as much CPU memory as the tensors of one snapshot. Call all methods from one
    thread.

    Args:
        store: does the file operations.
        run_dir: the run's directory.
        after: called in the thread with the path of each checkpoint that is durable, on rank 0
            alone. Retention uses it.
        communicator: if given, its ranks write each checkpoint together, each from its own writer.
            It must be a process group of its own, because the collectives run in the threads.
        disks: if given, each machine keeps checkpoints on its own disk, and ``after`` is called on
            one rank of each. Its communicator is ``communicator``.
    """

    def __init__(
        self,
        store: Store,
        run_dir: Path,
        after: Callable[[Path], object] | None = None,
        communicator: Communicator | None = None,
        disks: NodeDisks | None = None,
    ):
        self._communicator = communicator
        self._disks = disks
        self._store = store
        self._run_dir = run_dir
        self._after = after
        self._buffers = _Buffers()
        self._thread: threading.Thread | None = None
        self._finished: list[Path] = []
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """True while a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, snapshot: Snapshot) -> None:
        """Copy ``snapshot`` and start to save it. Afterwards everything in it may be changed.

        Waits for a save in flight first, and raises its failure before anything is copied. Also
        raises what :func:`loopkit.checkpoint.writer.prepare` raises.
        """
        self._join()
        self._raise()
        pending = prepare(snapshot)
        pending.tensors, wait_for_copies = self._buffers.fill(pending.tensors)
        # Not a daemon: a program that ends without close() still finishes its last save.
        self._thread = threading.Thread(
            target=self._run, args=(pending, wait_for_copies), name="loopkit-checkpoint"
        )
        self._thread.start()

    def poll(self) -> list[Path]:
        """Return the checkpoints finished since the last call, without waiting.

        Raises the failure of a save, once.
        """
        if not self.busy:
            self._join()
            self._raise()
        done = list(self._finished)
        del self._finished[: len(done)]
        return done

    def wait(self) -> list[Path]:
        """Wait for the save in flight, then do as :meth:`poll`."""
        self._join()
        return self.poll()

    def close(self) -> list[Path]:
        """Do as :meth:`wait`, and free the buffers. ``submit`` may be called again."""
        self._join()
        self._buffers = _Buffers()
        return self.poll()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._join()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _raise(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _run(self, pending: PendingCheckpoint, wait_for_copies: Callable[[], None]) -> None:
        communicator, disks = self._communicator, self._disks
        writes = communicator is None or communicator.rank == 0
        try:
            wait_for_copies()
            if disks is not None:
                path = write_on_nodes(self._store, self._run_dir, pending, disks)
                writes = disks.leads
            elif communicator is None:
                path = write_checkpoint(self._store, self._run_dir, pending)
            else:
                path = write_sharded(self._store, self._run_dir, pending, communicator)
            self._finished.append(path)
            if self._after is not None and writes:
                self._after(path)
        except BaseException as error:
            self._failure = error


class _Buffers:
    """CPU tensors kept from save to save; pinned where the source is on a CUDA device."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], torch.Tensor] = {}
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def fill(
        self, tensors: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, dict[str, Any]], Callable[[], None]]:
        """Start to copy tensors, given by prefix and name.

        Returns:
            The copies, and a function that waits until those from devices are complete.
        """
        copies: dict[str, dict[str, Any]] = {}
        used: dict[tuple[str, str], torch.Tensor] = {}
        for prefix, named in tensors.items():
            aliases = find_aliases(named)
            copied = copies[prefix] = {}
            for name, value in named.items():
                if name in aliases:
                    copied[name] = copied[aliases[name]]
                    continue
                tensor = value.tensor if isinstance(value, Shard) else value
                if tensor is None:
                    copied[name] = value
                    continue
                used[prefix, name] = copy = self._copy((prefix, name), tensor.detach())
                copied[name] = replace(value, tensor=copy) if isinstance(value, Shard) else copy
        self.kept = used
        return copies, self._completion()

    def _copy(self, key: tuple[str, str], tensor: torch.Tensor) -> torch.Tensor:
        pinned = tensor.is_cuda
        buffer = self.kept.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        if not pinned:
            return buffer.copy_(tensor)
        stream = self.streams.get(tensor.device)
        if stream is None:
            stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
            self.streams[tensor.device] = stream
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            buffer.copy_(tensor, non_blocking=True)
        # The memory of the source may be freed on a stream that does not wait for this one.
        tensor.record_stream(stream)
        return buffer

    def _completion(self) -> Callable[[], None]:
        """Return a function that waits for the copies that were started."""
        events: list[Any] = []
        for device, stream in self.streams.items():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            # Later changes to the sources run after the copy; the host does not wait.
            torch.cuda.current_stream(device).wait_event(event)
            events.append(event)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait
