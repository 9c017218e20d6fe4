"""Bringing groups of batches to the device: in place, or one group ahead on a CUDA stream of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from loopkit.data.micro_batches import MicroBatches
from loopkit.data.nested import map_tensors, transfer_fn

TransferFn = Callable[[Iterator[MicroBatches]], Iterator[MicroBatches]]


def prefetch_to(
    device: torch.device, dtype: torch.dtype | None, *, ahead: bool
) -> TransferFn | None:
    """What brings groups to ``device`` (floating tensors to ``dtype``); None when they are there
    already.

    ``ahead`` lets a CUDA device copy one group before it is asked for; elsewhere it has no effect.
    """
    if device.type == "cuda" and ahead:
        return CudaPrefetcher(device, dtype)
    move = transfer_fn(device, dtype)
    if move is None:
        return None

    def bring(groups: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        for group in groups:
            group[:] = [move(batch) for batch in group]
            yield group

    return bring


class CudaPrefetcher:
    """Copies one group ahead, so that it travels while the device computes on the one before.

    Memory is pinned where the data loader has not done so: only page-locked memory copies without
    holding up the host. Nothing here waits on the host; the stream in use waits for the copy's
    event.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self.device = device
        self.dtype = dtype
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, groups: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
        """Yield each group once the current stream is behind its copy, with the next one under way."""
        held: tuple[MicroBatches, torch.cuda.Event] | None = None
        for group in groups:
            copied = self._start(group)
            if held is not None:
                yield self._claimed(*held)
            held = copied
        if held is not None:
            yield self._claimed(*held)

    def _start(self, group: MicroBatches) -> tuple[MicroBatches, torch.cuda.Event]:
        with torch.cuda.stream(self._stream):
            group[:] = [map_tensors(self._copy, batch) for batch in group]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return group, event

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else None
        return tensor.to(self.device, dtype, non_blocking=True)

    def _claimed(self, group: MicroBatches, event: torch.cuda.Event) -> MicroBatches:
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)

        def claim(tensor: Tensor) -> Tensor:
            if tensor.is_cuda:
                tensor.record_stream(
                    stream
                )  # the allocator must not hand it out while the step reads it
            return tensor

        map_tensors(claim, list(group))
        return group
