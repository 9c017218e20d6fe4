"""ClosureStep: an optimizer step in which the optimizer asks for loss and gradients, as LBFGS does."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import OptionError, TaskError
from loopkit.loops.auto_micro_batch import AutoMicroBatchStep
from loopkit.loops.step import StepLoop
from loopkit.metrics.accumulator import MetricAccumulator
from loopkit.run import Run
from loopkit.task import name_of


class ClosureStep(StepLoop):
    """One optimizer step of an optimizer that needs a closure, such as ``torch.optim.LBFGS``.

    The optimizer computes loss and gradients as often as it needs to. Each time, the gradients are
    those of the exact mean loss over all micro-batches and ranks, divided and clipped as in
    any step, and the loss is that mean. The random numbers of a step, such as its dropout masks, are
    the same each time. The first loss is logged, and ``on_before_update`` is emitted once.

    Example::

        Fit(step=ClosureStep()).run(task)  # optimizers() returns torch.optim.LBFGS(...)
    """

    def run(self, run: Run, batches: MicroBatches) -> Mapping[str, Any]:
        """Do one step of each optimizer over ``batches``.

        Returns:
            The values of the first call of ``train_step`` with the last micro-batch.
        """
        several = len(run.optimizers) > 1
        out: Mapping[str, Any] = {}
        for name, optimizer in run.optimizers.items():
            schedule = run.schedules.get(name)
            if schedule is not None:
                schedule.before_update(run.progress.step)
            out = self._minimize(run, batches, optimizer, [name] if several else None)
            if schedule is not None:
                schedule.after_update()
        return out

    def _minimize(
        self, run: Run, batches: MicroBatches, optimizer: Optimizer, names: list[str] | None
    ) -> Mapping[str, Any]:
        """Step one optimizer. Nothing has changed if a loss or a gradient is not finite."""
        outs: list[Mapping[str, Any]] = []

        def closure() -> float:
            _clear(optimizer)
            out, loss, norm = self._evaluate(run, batches, names, first=not outs)
            outs.append(out)
            if run.options.on_nan != "ignore" and not math.isfinite(loss + norm):
                raise _NotFinite
            return loss

        parameters = _parameters(optimizer)
        before = [parameter.detach().clone() for parameter in parameters]
        # Only a step that is skipped needs the state again: a run that raises ends.
        state = copy.deepcopy(optimizer.state_dict()) if run.options.on_nan == "skip" else None
        try:
            optimizer.step(closure)
        except _NotFinite:
            for parameter, value in zip(parameters, before):
                parameter.data.copy_(value)
            if state is not None:
                optimizer.load_state_dict(state)
        _clear(optimizer)
        return outs[0]

    def _evaluate(
        self, run: Run, batches: MicroBatches, names: list[str] | None, *, first: bool
    ) -> tuple[Mapping[str, Any], float, float]:
        """Compute the gradients.

        Returns:
            The values of the step, the exact mean loss over all ranks, and the norm of the gradients.
        """
        collected, run.accumulator = run.accumulator, MetricAccumulator()
        try:
            out = self.backward(run, batches, optimizers=names, reuse_rng=True)
        finally:
            values, run.accumulator = run.accumulator, collected
        if first:
            run.accumulator.absorb(values)
        loss = values.take(run.strategy.dp.all_gather_object)["train/loss"]
        norm = run.strategy.finalize_gradients(names, self._divisor, want_norm=True)
        assert norm is not None
        if first:
            heard = run.events.before_update
            if heard is not None or run.strategy.settings.clip_norm is not None:
                run.accumulator.add("train/grad_norm", norm, reduce="last")
            if heard is not None:
                heard(run, norm)
        return out, loss, float(norm)


class _NotFinite(Exception):
    """Ends the optimizer's own loop where a loss or a gradient is not finite."""


def check_closures(run: Run) -> None:
    """Refuse an optimizer that needs a closure in a step that has none, and where none can work.

    Raises:
        TaskError: an optimizer needs a closure, and the step is the default one.
        OptionError: the strategy or the precision does not allow a ``ClosureStep``.
    """
    step = run.loops.step
    if type(step).run in (StepLoop.run, AutoMicroBatchStep.run):
        for optimizer in run.optimizers.values():
            closure = inspect.signature(optimizer.step).parameters.get("closure")
            if closure is not None and closure.default is inspect.Parameter.empty:
                kind = type(optimizer).__name__
                raise TaskError(
                    f"{name_of(run.task)}.optimizers() returned {kind}, which computes the loss "
                    "several times in a step: pass Fit(step=ClosureStep()), with "
                    "from loopkit import ClosureStep"
                )
    if isinstance(step, ClosureStep):
        if run.strategy.scaler is not None:
            raise OptionError(
                "ClosureStep reads the loss and the gradients in each step, and precision='fp16' "
                "scales them: take 'bf16' or 'fp32'"
            )
        if run.strategy.sharded or not run.strategy.exposes_gradients:
            raise OptionError(
                f"ClosureStep needs whole parameters on each rank, and {run.strategy.name} shards "
                "them: take strategy='ddp'"
            )


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _clear(optimizer: Optimizer) -> None:
    for parameter in _parameters(optimizer):
        parameter.grad = None
