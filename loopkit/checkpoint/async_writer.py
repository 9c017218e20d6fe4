"""Saving while training goes on: the step waits only for the copy into kept buffers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from loopkit.checkpoint.format import Shard, Snapshot
from loopkit.checkpoint.safetensors_io import find_aliases
from loopkit.checkpoint.sharded_writer import Everyone, write_together
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.writer import PendingCheckpoint, draft, write


class BackgroundWriter:
    """Writes checkpoints in one thread, at most one at a time.

    ``after(path)`` runs in that thread when a checkpoint is durable; retention is its use. The
    buffers take as much CPU memory as the tensors of one snapshot. All methods are called from one
    thread.

    ``ranks`` are those who write each checkpoint together, each from a writer of its own; their
    collectives run in the threads, so they must be a group of their own.
    """

    def __init__(
        self,
        store: Store,
        run_dir: Path,
        after: Callable[[Path], object] | None = None,
        ranks: Everyone | None = None,
    ):
        self._ranks = ranks
        self._store = store
        self._run_dir = run_dir
        self._after = after
        self._buffers = _Buffers()
        self._thread: threading.Thread | None = None
        self._finished: list[Path] = []
        self._failure: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, snapshot: Snapshot) -> None:
        """Copy ``snapshot`` and start saving it; on return everything in it may be changed.

        A save in flight is waited for, and its failure is raised here, before anything is copied.
        Raises what :func:`loopkit.checkpoint.writer.draft` raises.
        """
        self._join()
        self._raise()
        ready = draft(snapshot)
        ready.tensors, copied = self._buffers.fill(ready.tensors)
        # Not a daemon: a program that ends without close() still finishes its last save.
        self._thread = threading.Thread(
            target=self._run, args=(ready, copied), name="loopkit-checkpoint"
        )
        self._thread.start()

    def poll(self) -> list[Path]:
        """The checkpoints finished since the last call, without waiting; raises a save's failure,
        once.
        """
        if not self.busy:
            self._join()
            self._raise()
        done = list(self._finished)
        del self._finished[: len(done)]
        return done

    def wait(self) -> list[Path]:
        """Wait for the save in flight, then as :meth:`poll`."""
        self._join()
        return self.poll()

    def close(self) -> list[Path]:
        """Wait as :meth:`wait` and give the buffers back; ``submit`` may be called again."""
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

    def _run(self, ready: PendingCheckpoint, copied: Callable[[], None]) -> None:
        try:
            copied()
            if self._ranks is None:
                path = write(self._store, self._run_dir, ready)
            else:
                path = write_together(self._store, self._run_dir, ready, self._ranks)
            self._finished.append(path)
            if self._after is not None and (self._ranks is None or self._ranks.rank == 0):
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
        """Copies by stem and name, and a function that waits until copies from devices have
        arrived.
        """
        copies: dict[str, dict[str, Any]] = {}
        used: dict[tuple[str, str], torch.Tensor] = {}
        for prefix, named in tensors.items():
            aliases = find_aliases(named)
            made = copies[prefix] = {}
            for name, held in named.items():
                if name in aliases:
                    made[name] = made[aliases[name]]
                    continue
                tensor = held.tensor if isinstance(held, Shard) else held
                if tensor is None:
                    made[name] = held
                    continue
                used[prefix, name] = copy = self._copy((prefix, name), tensor.detach())
                made[name] = replace(held, tensor=copy) if isinstance(held, Shard) else copy
        self.kept = used
        return copies, self._hand_over()

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
        # The source's memory may be freed on a stream that does not wait for this one.
        tensor.record_stream(stream)
        return buffer

    def _hand_over(self) -> Callable[[], None]:
        events: list[Any] = []
        for device, stream in self.streams.items():
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
            # What the caller does to the sources next runs after the copy, without holding up the
            # caller.
            torch.cuda.current_stream(device).wait_event(event)
            events.append(event)

        def wait() -> None:
            for event in events:
                event.synchronize()

        return wait
