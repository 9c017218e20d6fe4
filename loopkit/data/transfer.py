"""Moving batches to the device: at once, or one step ahead on a CUDA stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loopkit.data.batches import cast_object, map_batch
from loopkit.data.micro_batches import MicroBatches
from loopkit.dtypes import stored_dtype

GroupTransferFn = Callable[[Iterator[MicroBatches]], Iterator[MicroBatches]]


def transfer_fn(device: torch.device, dtype: torch.dtype | None) -> Callable[[Any], Any] | None:
    """Return a function that moves one batch to ``device``; None where nothing is to be done.

    Args:
        dtype: what floating-point tensors are converted to; None keeps theirs.
    """
    if device.type == "cpu" and dtype is None:
        return None
    transfer = _Transfer(device, dtype)
    return lambda batch: map_batch(batch, transfer.tensor, transfer.object)


class _Transfer:
    """Moves tensors, and objects that have ``.to``, to a device; casts their floats to a type."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = device
        self.dtype = dtype

    def tensor(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self._target(tensor), non_blocking=True)

    def object(self, batch: Any) -> Any:
        try:
            moved = batch.to(self.device, non_blocking=True)
        except TypeError:  # many take the device alone
            moved = batch.to(self.device)
        return moved if self.dtype is None else cast_object(moved, self.cast)

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._target(tensor))

    def _target(self, tensor: Tensor) -> torch.dtype:
        return stored_dtype(tensor.dtype, self.dtype)


def group_transfer_fn(
    device: torch.device, dtype: torch.dtype | None, *, prefetch: bool
) -> GroupTransferFn | None:
    """Return a function that moves the groups of an iterator; None where nothing is to be done.

    Args:
        dtype: what floating-point tensors are converted to; None keeps theirs.
        prefetch: copy each group while the device computes on the one before; on CUDA alone.
    """
    if device.type == "cuda" and prefetch:
        return CudaPrefetcher(device, dtype)
    to_device = transfer_fn(device, dtype)
    if to_device is None:
        return None

    def transfer(groups: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        for group in groups:
            group[:] = [to_device(batch) for batch in group]
            yield group

    return transfer


class CudaPrefetcher:
    """Copies each group to the device while the device computes on the group before.

    The host never waits: the stream of the computation waits for the event of the copy. Memory that
    the data loader has not pinned is pinned here, because only a copy from page-locked memory is
    asynchronous. An object that cannot mark its memory as in use on a stream (``record_stream``)
    is copied when its turn comes.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self._transfer = _Transfer(device, dtype)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, groups: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Yield each group on the device; the copy of the next one has begun by then."""
        held: tuple[MicroBatches, torch.cuda.Event] | None = None
        for group in groups:
            copied = self._begin_copy(group)
            if held is not None:
                yield self._ready(*held)
            held = copied
        if held is not None:
            yield self._ready(*held)

    def _begin_copy(self, group: MicroBatches) -> tuple[MicroBatches, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            group[:] = [map_batch(batch, self._copy, self._copy_object) for batch in group]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return group, event

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return self._transfer.tensor(tensor)

    def _copy_object(self, batch: Any) -> Any:
        if not can_record_stream(batch):
            return batch
        return self._transfer.object(batch.pin_memory() if hasattr(batch, "pin_memory") else batch)

    def _ready(self, group: MicroBatches, event: torch.cuda.Event) -> MicroBatches:
        stream = torch.cuda.current_stream(self._transfer.device)
        stream.wait_event(event)

        def keep_for_stream(part: Any) -> Any:
            # Otherwise the allocator could reuse the memory while the step still reads it.
            if not isinstance(part, Tensor) or part.is_cuda:
                part.record_stream(stream)
            return part

        def keep_or_move(batch: Any) -> Any:
            return (keep_for_stream if can_record_stream(batch) else self._transfer.object)(batch)

        group[:] = [map_batch(batch, keep_for_stream, keep_or_move) for batch in group]
        return group


def can_record_stream(batch: Any) -> bool:
    """Return whether an object can tell the allocator which stream uses its memory."""
    return callable(getattr(type(batch), "record_stream", None))
