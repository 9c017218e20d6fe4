"""Moving batches to the device: at once, or one step ahead on a CUDA stream of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from loopkit.data.micro_batches import MicroBatches
from loopkit.dtypes import stored_dtype
from loopkit.nested import map_instances

GroupTransferFn = Callable[[Iterator[MicroBatches]], Iterator[MicroBatches]]


def transfer_fn(device: torch.device, dtype: torch.dtype | None) -> Callable[[Any], Any] | None:
    """Return a function that moves one batch to ``device``; None where nothing is to be done.

    Args:
        dtype: what floating-point tensors are converted to; None keeps theirs.
    """
    if device.type == "cpu" and dtype is None:
        return None

    def to_device(tensor: Tensor) -> Tensor:
        return tensor.to(device, stored_dtype(tensor.dtype, dtype), non_blocking=True)

    return lambda batch: map_instances(Tensor, to_device, batch)


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
    asynchronous.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = device
        self.dtype = dtype
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
            group[:] = [map_instances(Tensor, self._to_device, batch) for batch in group]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return group, event

    def _to_device(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        dtype = stored_dtype(tensor.dtype, self.dtype)
        return tensor.to(self.device, dtype, non_blocking=True)

    def _ready(self, group: MicroBatches, event: torch.cuda.Event) -> MicroBatches:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)

        def keep_for_stream(tensor: Tensor) -> Tensor:
            # Otherwise the allocator could reuse the memory while the step still reads it.
            if tensor.is_cuda:
                tensor.record_stream(stream)
            return tensor

        map_instances(Tensor, keep_for_stream, list(group))
        return group
