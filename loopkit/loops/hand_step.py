"""HandStep: one optimizer step whose parts a loop written by hand calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loopkit.data.micro_batches import MicroBatches
from loopkit.distributed.gather import dummy_batch
from loopkit.errors import TaskError
from loopkit.loops.check_finite import check_finite
from loopkit.loops.loss_weighting import LossWeighting
from loopkit.loops.step import StepLoop, read_step
from loopkit.metrics.kept import without_updates
from loopkit.rng import at_step
from loopkit.run import Run
from loopkit.task import name_of

# DistributedDataParallel averages no gradient of these.
_WITHOUT_GRADIENTS = ("eval_step", "test_step", "predict_step")


class HandStep(StepLoop):
    """One optimizer step over its micro-batches, in parts: ``forward``, ``backward``, ``close``.

    It computes what ``StepLoop.run`` computes, to the bit.

    Args:
        run: the run.
        batches: the micro-batches of this step.
        before: the step before, whose scale of weights this one keeps.
    """

    def __init__(self, run: Run, batches: MicroBatches, before: HandStep | None = None) -> None:
        self.batches, self.index, self.method = batches, 0, ""
        self._run = run
        self._summed: LossWeighting | None = None
        if before is not None:
            self._scale = before._scale

    @property
    def size(self) -> int:
        """The samples of the present micro-batch on this rank; 0 for a dummy batch."""
        return self.batches.sizes[self.index]

    def forward(self, batch: Any, method: str) -> Any:
        """Return what the task's ``method`` returns for the present micro-batch."""
        run, strategy = self._run, self._run.strategy
        if method in _WITHOUT_GRADIENTS:
            raise TaskError(
                f"forward(batch, {method!r}): a strategy trains train_step and methods of your own. "
                "evaluate() calls eval_step"
            )
        call, context, self.method = strategy.step_fn(method), strategy.forward_context, method
        if run.seed is not None:
            number = self.index * strategy.dp.size + strategy.dp.rank
            strategy.set_seed(at_step(run.seed, run.progress.step, number))
        strategy.set_gradient_sync(self.index == len(self.batches) - 1)
        if not self.size:
            call, context = without_updates(run.task, call), dummy_batch(context)
        if context is None:
            return call(batch)
        with context:
            return call(batch)

    def backward(self, returned: Any) -> Tensor:  # type: ignore[override]
        """Add the gradients of the loss that a step returned, and go to the next micro-batch."""
        run = self._run
        if not self.method:
            raise TaskError(
                "backward(loss) came before forward(batch): call the task through forward, which "
                "applies the precision and lets the ranks average gradients"
            )
        loss, weight, out = read_step(returned, run.task, self.method)
        combined = run.strategy.dp.size > 1 or run.train_loader.accumulate > 1
        if combined or weight is not None:
            self._summed = self._summed or self._weighting(run, self.batches, self.method, combined)
            loss = self._summed.scaled(loss, weight, self.size)
        run.strategy.backward(loss, None if combined else out["loss"])
        self.index, self.method = self.index + 1, ""
        return out["loss"]  # type: ignore[no-any-return]

    def close(self) -> None:
        """Update the parameters, and count the step.

        Raises:
            NotFiniteError: under ``on_nan="raise"``.
        """
        run = self._run
        self._divisor = None if self._summed is None else self._finished(run, self._summed)
        self.update(run)
        nonfinite = run.strategy.finish_step()
        run.progress.count(self.batches)
        if nonfinite:
            check_finite(run)

    def check_used(self, position: int) -> None:
        """Refuse to read on while the gradients of a micro-batch are missing.

        Args:
            position: how many micro-batches were given to the loop.
        """
        if self.index != position:
            raise TaskError(
                f"the loop over {name_of(self._run.task)}'s batches reads on without backward() for "
                "the last one: call forward, backward and step once for each batch, since every "
                "rank must"
            )
