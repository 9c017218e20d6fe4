"""AutoMicroBatchStep: split micro-batches where the device's memory runs out."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import LoopkitWarning, OptionError
from loopkit.loops.step import StepLoop
from loopkit.metrics.accumulator import MetricAccumulator
from loopkit.metrics.kept import metrics_snapshot
from loopkit.run import Run

logger = logging.getLogger(__name__)
_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory")


class AutoMicroBatchStep(StepLoop):
    """An optimizer step that starts again with smaller micro-batches when memory runs out.

    The gradient is that of the same samples, weighted as in any accumulation. The update is outside
    of the part that is repeated. A failed attempt leaves nothing in the log, in buffers and in the
    metrics that the task keeps. The number of splits is kept for later steps and saved, so that a
    resumed run splits in the same way.
    """

    def __init__(self) -> None:
        self.splits = 1

    def run(self, run: Run, batches: MicroBatches) -> Mapping[str, Any]:
        """Do one optimizer step over ``batches``."""
        out = self._backward_that_fits(run, batches)
        self.update(run)
        return out

    def state_dict(self) -> dict[str, Any]:
        """Return the number of parts that a micro-batch is split into."""
        return {"splits": self.splits}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""
        self.splits = state["splits"]

    def _backward_that_fits(self, run: Run, batches: MicroBatches) -> Mapping[str, Any]:
        undo = _forward_snapshot(run.task)
        while True:
            split = split_batches(batches, self.splits)
            collected, run.accumulator = run.accumulator, MetricAccumulator()
            try:
                out = self.backward(run, split)
            except Exception as error:
                run.accumulator = collected  # a failed attempt logs nothing
                if not is_out_of_memory(error) or max(split.sizes) <= 1:
                    raise
                for batch, size in zip(batches, batches.sizes):
                    if size > 1 and not can_split(batch, size):
                        raise OptionError(
                            f"memory ran out, and micro_batch='auto' cannot split a batch of the type "
                            f"{type(batch).__name__}: it has no tensor or list with one entry for each "
                            f"of its {size} samples. Give a smaller batch_size, and accumulate="
                        ) from error
                problem = str(error).splitlines()[0]
            else:
                collected.absorb(run.accumulator)
                run.accumulator = collected
                return out
            # Only here is the error gone, and with it the frames that hold the activations.
            undo()
            self._halve(run, problem)

    def _halve(self, run: Run, problem: str) -> None:
        self.splits *= 2
        run.task.zero_grad()
        if run.strategy.device.type == "cuda":
            torch.cuda.empty_cache()
        message = (
            f"step {run.progress.step + 1} does not fit into memory ({problem}): it starts again, "
            f"and each micro-batch is split into {self.splits} parts from now on"
        )
        logger.debug(message)
        warnings.warn(message, LoopkitWarning, stacklevel=3)


def _forward_snapshot(task: nn.Module) -> Callable[[], None]:
    """Return a function that undoes what forward passes change: buffers and kept metrics."""
    undo_metrics = metrics_snapshot(task)
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in task.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]

    def undo() -> None:
        undo_metrics()
        for module, name, buffer, saved in buffers:
            buffer.copy_(saved)
            setattr(module, name, buffer)

    return undo


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that the device has not enough memory."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def split_batches(batches: MicroBatches, splits: int) -> MicroBatches:
    """Split each micro-batch into up to ``splits`` slices of about the same number of samples."""
    if splits == 1:
        return batches
    parts: list[Any] = []
    sizes: list[int] = []
    for batch, size in zip(batches, batches.sizes):
        step = -(-size // splits)
        for low in range(0, size, step):
            high = min(low + step, size)
            parts.append(_slice(batch, low, high, size))
            sizes.append(high - low)
    return batches.with_batches(parts, sizes)


def can_split(batch: Any, size: int) -> bool:
    """Return whether a batch has a value with one entry per sample."""
    if isinstance(batch, Tensor):
        return batch.ndim > 0 and batch.shape[0] == size
    if isinstance(batch, Mapping):
        return any(can_split(value, size) for value in batch.values())
    if isinstance(batch, (list, tuple)):
        entries = type(batch) is list and len(batch) == size
        return entries or any(can_split(value, size) for value in batch)
    return False


def _slice(part: Any, low: int, high: int, size: int) -> Any:
    """Return ``part`` of a batch for some samples: only values with one entry per sample change."""
    if isinstance(part, Tensor):
        return part[low:high] if part.ndim and part.shape[0] == size else part
    if isinstance(part, Mapping):
        kept = {key: _slice(value, low, high, size) for key, value in part.items()}
        return kept if type(part) is dict else type(part)(kept)  # type: ignore[call-arg]
    if isinstance(part, tuple):
        made = [_slice(value, low, high, size) for value in part]
        return type(part)(*made) if hasattr(part, "_fields") else tuple(made)
    if isinstance(part, list):
        per_sample = len(part) == size
        tensors = any(isinstance(value, Tensor) and value.ndim for value in part)
        if per_sample and not tensors:
            return part[low:high]
        return [_slice(value, low, high, size) for value in part]
    return part
