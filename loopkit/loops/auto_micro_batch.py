"""AutoMicroBatchStep: micro-batches cut smaller where the device's memory runs out, with the same
gradient.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import LoopkitWarning
from loopkit.loops.step import StepLoop
from loopkit.metrics.accumulator import MetricAccumulator
from loopkit.run import Run

_SIGNS = ("can't allocate memory", "out of memory", "not enough memory")


class AutoMicroBatchStep(StepLoop):
    """One optimizer step, begun anew over micro-batches of half the size when it does not fit into
    memory.

    The gradient is that of the same samples, by weight as with any accumulation; the update is out
    of the part that is begun anew. What fits is kept for the steps to come, and saved, so that a
    resumed run cuts alike.
    """

    def run(self, run: Run, batches: MicroBatches) -> Mapping[str, Any]:
        """Do the step; what it returns goes to ``on_step_end``."""
        out = self._that_fits(run, batches)
        self.update(run)
        return out

    def _that_fits(self, run: Run, batches: MicroBatches) -> Mapping[str, Any]:
        while True:
            cut = split_batches(batches, run.micro_batch_splits)
            collected, run.accumulator = (
                run.accumulator,
                MetricAccumulator(),
            )  # what a broken-off attempt logs is not kept
            try:
                out = self.backward(run, cut)
            except Exception as error:
                run.accumulator = collected
                run.task._logged.clear()
                if not is_out_of_memory(error) or max(cut.sizes) <= 1:
                    raise
                told = str(error).splitlines()[0]
            else:
                collected.absorb(run.accumulator)
                run.accumulator = collected
                return out
            # Only here is the error gone, and with it the frames that hold the activations.
            self._halve(run, told)

    def _halve(self, run: Run, told: str) -> None:
        run.micro_batch_splits *= 2
        run.task.zero_grad()
        if run.strategy.device.type == "cuda":
            torch.cuda.empty_cache()
        said = (
            f"step {run.progress.step + 1} does not fit into memory ({told}): it is begun anew, "
            f"and each "
            f"micro-batch is taken in {run.micro_batch_splits} parts from here on"
        )
        warnings.warn(said, LoopkitWarning, stacklevel=3)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the device's memory does not suffice."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def split_batches(batches: MicroBatches, parts: int) -> MicroBatches:
    """The group with each micro-batch in up to ``parts`` slices of about the same number of
    samples.
    """
    if parts == 1:
        return batches
    cut = MicroBatches(batches.start)
    for batch, size in zip(batches, batches.sizes):
        step = -(-size // parts)
        for low in range(0, size, step):
            high = min(low + step, size)
            cut.append(_slice(batch, low, high, size))
            cut.sizes.append(high - low)
    cut.samples, cut.total, cut.tokens = batches.samples, batches.total, batches.tokens
    cut.end, cut.last, cut.state = batches.end, batches.last, batches.state
    return cut


def _slice(part: Any, low: int, high: int, size: int) -> Any:
    """``part`` of a batch for some of its samples: what has one entry for each of them is sliced,
    the rest is kept.
    """
    if isinstance(part, Tensor):
        return part[low:high] if part.ndim and part.shape[0] == size else part
    if isinstance(part, Mapping):
        kept = {key: _slice(value, low, high, size) for key, value in part.items()}
        return kept if type(part) is dict else type(part)(kept)  # type: ignore[call-arg]
    if isinstance(part, tuple):
        made = [_slice(value, low, high, size) for value in part]
        return type(part)(*made) if hasattr(part, "_fields") else tuple(made)
    if isinstance(part, list):
        whole = len(part) == size and not any(
            isinstance(value, Tensor) and value.ndim for value in part
        )
        return part[low:high] if whole else [_slice(value, low, high, size) for value in part]
    return part
