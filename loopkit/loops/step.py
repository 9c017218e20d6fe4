"""StepLoop: one optimizer step: forward and backward for each micro-batch, then one update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from loopkit.data.micro_batches import MicroBatches
from loopkit.distributed.gather import dummy_batch
from loopkit.errors import TaskError
from loopkit.loops.loss_weighting import LossWeighting
from loopkit.metrics.kept import without_updates
from loopkit.rng import at_step, mix
from loopkit.run import Progress, Run
from loopkit.task import Logged, Task, name_of


class StepLoop:
    """One optimizer step. A custom one overrides ``run`` and calls ``backward`` and ``update``.

    Precision, accumulation, clipping, events and counting stay as they are in any such step.
    """

    _divisor: Tensor | float | None = None  # of the gradients that `backward` added up
    _scale: tuple[Progress | None, float | None] = None, None  # of the weights of one run

    def run(self, run: Run, batches: MicroBatches) -> Mapping[str, Any]:
        """Do one optimizer step over ``batches``.

        Returns:
            A mapping, which is given to ``on_step_end``.
        """
        out = self.backward(run, batches)
        self.update(run)
        return out

    def backward(
        self,
        run: Run,
        batches: MicroBatches,
        method: str = "train_step",
        optimizers: Sequence[str] | None = None,
        *,
        log: bool = True,
        reuse_rng: bool = False,
    ) -> Mapping[str, Any]:
        """Run ``task.<method>`` on each micro-batch, and add the gradients of the exact mean loss.

        The gradients are those of one big batch over all ranks (``LossWeighting``).

        Args:
            run: the run.
            batches: the micro-batches, on the device.
            method: the name of the task's method that returns the loss.
            optimizers: the names of optimizers; only their parameters get gradients. None for all.
            log: False for a pass whose values are not to be logged.
            reuse_rng: True for the random numbers of this method's first pass in this step, such as
                its dropout masks. False for new ones in each pass.

        Returns:
            The values that the last micro-batch's step returned, detached.

        Raises:
            TaskError: the step returned no usable loss.
            DataError: the weights of the step add up to 0.
        """
        if optimizers is not None:
            with _gradients_of(run, optimizers):
                return self.backward(run, batches, method, log=log, reuse_rng=reuse_rng)
        strategy, dp = run.strategy, run.strategy.dp
        # The same for all steps of a run, also for the shorter last one of an epoch: ranks and
        # micro-batches can then replace each other without changing a bit.
        combined = (
            dp.size > 1
            or len(batches) > 1
            or (run.loader is not None and run.loader.accumulate > 1)
        )
        step_fn, context = strategy.step_fn(method), strategy.forward_context
        collector, progress, timings = run.task.log_collector, run.progress, run.record.timings
        micro_step_end = run.events.micro_step_end
        passes = progress.passes.get(method, 0)
        seed, prefix = (
            (run.seed, "train/")
            if method == "train_step" and not passes
            else _of_pass(run.seed, method, 0 if reuse_rng else passes)
        )
        weighting: LossWeighting | None = None
        out: Mapping[str, Any] = {}
        for index, batch in enumerate(batches):
            if seed is not None:
                strategy.set_seed(at_step(seed, progress.step, index * dp.size + dp.rank))
            if combined:
                strategy.set_gradient_sync(index == len(batches) - 1)
            size = batches.sizes[index]
            call, within = step_fn, context
            if not size:  # a dummy batch
                call, within = without_updates(run.task, step_fn), dummy_batch(context)
            began = perf_counter()
            # As `with collector as logged`, without its two calls in every step.
            logged: list[Logged] = []
            outer, collector.values = collector.values, logged
            try:
                if within is None:
                    returned = call(batch)
                else:
                    with within:
                        returned = call(batch)
            finally:
                collector.values = outer
            loss, weight, out = read_step(returned, run.task, method)
            if combined or weight is not None:
                weighting = weighting or self._weighting(run, batches, method, combined)
                loss = weighting.scaled(loss, weight, size)
            strategy.backward(loss, None if combined else out["loss"])
            timings.compute += perf_counter() - began
            if log and size:
                self._log(run, prefix, out, logged, size if weight is None else weight, size)
            if micro_step_end is not None:
                micro_step_end(run, out)
        progress.passes[method] = passes + 1
        self._divisor = None if weighting is None else self._finished(run, weighting)
        return out

    def update(self, run: Run, optimizers: Sequence[str] | None = None) -> None:
        """Finish the gradients, emit ``on_before_update``, and step the optimizers and schedules.

        Args:
            run: the run.
            optimizers: the names of the optimizers; None for all.
        """
        strategy, before_update, schedules = run.strategy, run.events.before_update, run.schedules
        began = perf_counter()
        norm = strategy.finalize_gradients(
            optimizers, self._divisor, want_norm=before_update is not None
        )
        if norm is not None:
            run.accumulator.add("train/grad_norm", norm, reduce="last")
        if before_update is not None:
            before_update(run, norm)
        names = schedules if optimizers is None else [n for n in optimizers if n in schedules]
        for name in names:
            schedules[name].before_update(run.progress.step)
        strategy.optimizer_step(optimizers)
        for name in names:
            schedules[name].after_update()
        run.record.timings.update += perf_counter() - began

    @staticmethod
    def _log(
        run: Run,
        prefix: str,
        out: Mapping[str, Any],
        logged: list[Logged],
        weight: Tensor | float,
        size: int,
    ) -> None:
        """Log what a step returned, and what it logged by itself."""
        accumulator = run.accumulator
        for name, value in out.items():
            accumulator.add(prefix + name, value, weight)
        for name, value, reduce in logged:
            accumulator.add(name, value, size, reduce)

    def _weighting(
        self, run: Run, batches: MicroBatches, method: str, combined: bool
    ) -> LossWeighting:
        progress, scale = self._scale
        return LossWeighting(
            batches,
            run.strategy.dp,
            step=(run.task, method),
            scale=scale if progress is run.progress else None,
            combined=combined,
        )

    def _finished(self, run: Run, weighting: LossWeighting) -> Tensor | float | None:
        """Keep the scale for the next steps of this run, and return the divisor."""
        divisor = weighting.divisor()
        if run.strategy.dp.size > 1:
            self._scale = run.progress, weighting.scale
        return divisor


def read_step(returned: Any, task: Task, method: str) -> tuple[Tensor, Any, Mapping[str, Any]]:
    """Return the loss, its weight (None without) and the values to log of what a step returned.

    Raises:
        TaskError: there is no loss, or it is not a scalar with a gradient.
    """
    weight = None
    if isinstance(returned, Tensor):
        loss: Any = returned
        out = {"loss": returned.detach()}
    elif isinstance(returned, Mapping) and "loss" in returned:
        loss, weight = returned["loss"], returned.get("weight")
        out = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in returned.items()
            if name != "weight"
        }
    else:
        raise _no_loss(task, method, f"returned {_described(returned)}, with no loss")
    if not isinstance(loss, Tensor):
        raise _no_loss(task, method, f"returned a {type(loss).__name__} as loss")
    if loss.ndim:
        raise _no_loss(task, method, f"returned a loss of shape {tuple(loss.shape)}; take its mean")
    if not loss.requires_grad:
        raise _no_loss(
            task,
            method,
            "returned a loss without a gradient: it was detached, made under no_grad, "
            "or depends on no trainable parameter",
        )
    return loss, _exact(weight) if isinstance(weight, Tensor) else weight, out


def _no_loss(task: Task, method: str, problem: str) -> TaskError:
    return TaskError(
        f"{name_of(task)}.{method} {problem}: return a scalar tensor, or a dict with it as 'loss'"
    )


def _described(returned: Any) -> str:
    if isinstance(returned, (int, float)):
        return f"{returned!r}, a number without a gradient (leave out .item())"
    if not isinstance(returned, Mapping):
        return repr(returned)
    return f"a dict with {', '.join(map(repr, returned)) or 'nothing'}"


def _exact(weight: Tensor) -> Tensor:
    # Integers divide to the default dtype, which is too coarse for a gradient in double precision.
    return weight.detach().to(torch.float32 if weight.device.type == "mps" else torch.float64)


def _of_pass(seed: int | None, method: str, number: int) -> tuple[int | None, str]:
    """Return the seed and the log prefix of a pass of ``method`` in one step.

    Two methods, and two passes of one method, draw different random numbers.
    """
    own = method == "train_step"
    if seed is not None and not own:
        seed = mix(seed, crc32(method.encode()))
    if seed is not None and number:
        seed = mix(seed, number)
    return seed, "train/" if own else f"train/{method.removesuffix('_step')}_"


@contextmanager
def _gradients_of(run: Run, optimizers: Sequence[str]) -> Iterator[None]:
    """Inside, only the parameters of the named optimizers get gradients.

    Raises:
        TaskError: there is no optimizer of that name.
    """
    frozen = _held_by_others(run, optimizers)
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def _held_by_others(run: Run, optimizers: Sequence[str]) -> list[Any]:
    unknown = [name for name in optimizers if name not in run.optimizers]
    if unknown:
        raise TaskError(
            f"there is no optimizer {unknown[0]!r}: the task named {', '.join(run.optimizers)}"
        )
    held = {
        name: [p for group in optimizer.param_groups for p in group["params"]]
        for name, optimizer in run.optimizers.items()
    }
    own = {id(p) for name in optimizers for p in held[name]}
    others = [p for name, parameters in held.items() if name not in optimizers for p in parameters]
    return [p for p in others if id(p) not in own and p.requires_grad]
