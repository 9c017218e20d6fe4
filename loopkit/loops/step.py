"""StepLoop: one optimizer step over its micro-batches: forward and backward for each, then one
update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import DataError, TaskError
from loopkit.rng import at_step, mix
from loopkit.run import Run
from loopkit.task import Task, name_of


class StepLoop:
    """One optimizer step. A custom one overrides ``run`` and calls ``backward`` and ``update`` as
    it needs.

    It keeps precision, accumulation, clipping, events and counting, whatever it does in between.
    """

    def run(self, run: Run, batches: MicroBatches) -> Mapping[str, Any]:
        """Do the step; what it returns goes to ``on_step_end``."""
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
    ) -> Mapping[str, Any]:
        """Run ``task.<method>`` on each micro-batch and add up the gradients of the step's exact
        mean loss.

        Without weights a micro-batch counts by its samples, known beforehand. With weights each is
        taken relative to a unit and the sum is divided out of the gradients. Both give the gradient
        of one big batch, over all ranks, whose strategy averages what it is given.

        Args:
            optimizers: where given, only the parameters of these optimizers get gradients.
            log: whether what the step returns and logs is logged; False for a pass that only
                explores.

        Returns:
            What the last micro-batch's step returned, without its graph.

        Raises:
            TaskError: the step returned no usable loss.
            DataError: the step's weights add up to nothing.
        """
        strategy, task, running, timings = run.strategy, run.task, run.accumulator, run.timings
        world, place = strategy.dp.size, strategy.dp.rank
        # Of all of a run's steps alike, the shorter last one of an epoch too: then ranks can be
        # traded for batches.
        several = (
            world > 1
            or len(batches) > 1
            or (run.train_loader is not None and run.train_loader.accumulate > 1)
        )
        micro_step_end = run.events.micro_step_end
        call, context, step = strategy.step_fn(method), strategy.forward_context, run.progress.step
        seed = (
            run.seed
            if run.seed is None or method == "train_step"
            else mix(run.seed, crc32(method.encode()))
        )
        prefix = "train/" if method == "train_step" else f"train/{method.removesuffix('_step')}_"
        frozen = [] if optimizers is None else freeze_others(run, optimizers)
        count, total, sizes = len(batches), batches.total, batches.sizes
        weights: list[Any] = []
        out: Mapping[str, Any] = {}
        for index, batch in enumerate(batches):
            if seed is not None:
                strategy.set_seed(at_step(seed, step, index * world + place))
            if several:
                strategy.set_gradient_sync(index == count - 1)
            began = perf_counter()
            if context is None:
                returned = call(batch)
            else:
                with context:
                    returned = call(batch)
            loss, weight, out = read_step(returned, task, method)
            size = sizes[index]
            if weight is not None:
                weight = _exact(weight) if size else 0
                weights.append(weight)
            if several:
                if weight is not None:
                    loss = _weighed(loss, weight, _unit(run, weights))
                else:
                    loss = loss / (total / (size * world)) if size else _weighed(loss, 0, 1)
            strategy.backward(loss, None if several else out["loss"])
            timings.compute += perf_counter() - began
            if log and size:
                for name, value in out.items():
                    running.add(prefix + name, value, size if weight is None else weight)
            if task._logged:
                _drain(run, size, log and size > 0)
            if micro_step_end is not None:
                micro_step_end(run, out)
        for parameter in frozen:
            parameter.requires_grad_(True)
        run.divisor = _divisor(run, weights, count, method, several=several) if weights else None
        return out

    def update(self, run: Run, optimizers: Sequence[str] | None = None) -> None:
        """Make the gradients ready, show them to ``on_before_update``, and step the named
        optimizers (all).
        """
        strategy, before_update, schedules = run.strategy, run.events.before_update, run.schedules
        began = perf_counter()
        norm = strategy.finalize_gradients(
            optimizers, run.divisor, want_norm=before_update is not None
        )
        if norm is not None:
            run.accumulator.add("train/grad_norm", norm, reduce="last")
        if before_update is not None:
            before_update(run, norm)
        bound = (
            schedules.values()
            if optimizers is None
            else [schedules[n] for n in optimizers if n in schedules]
        )
        for schedule in bound:
            schedule.before_update(run.progress.step)
        strategy.optimizer_step(optimizers)
        for schedule in bound:
            schedule.after_update()
        run.timings.update += perf_counter() - began


def read_step(returned: Any, task: Task, method: str) -> tuple[Tensor, Any, Mapping[str, Any]]:
    """The loss, its weight (None without) and the scalars to log, from what a train step returned.

    Raises:
        TaskError: there is no loss, or it is no scalar with a gradient.
    """
    weight = None
    if isinstance(returned, Tensor):
        loss: Any = returned
        out = {"loss": returned.detach()}
    elif isinstance(returned, Mapping) and "loss" in returned:
        loss, weight = returned["loss"], returned.get("weight")
        out = {
            k: v.detach() if isinstance(v, Tensor) else v
            for k, v in returned.items()
            if k != "weight"
        }
    else:
        keys = ", ".join(map(repr, returned)) if isinstance(returned, Mapping) else ""
        what = (
            f"a dict with {keys or 'nothing'}" if isinstance(returned, Mapping) else repr(returned)
        )
        raise _no_loss(task, method, f"returned {what}, with no loss")
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
    return loss, weight, out


def _no_loss(task: Task, method: str, why: str) -> TaskError:
    return TaskError(
        f"{name_of(task)}.{method} {why}: return a scalar tensor, or a dict with it as 'loss'"
    )


def _exact(weight: Any) -> Any:
    # Counts divide to the default dtype, which is too coarse for a gradient in double precision.
    if isinstance(weight, Tensor):
        return weight.detach().to(torch.float32 if weight.device.type == "mps" else torch.float64)
    return weight


def _unit(run: Run, weights: list[Any]) -> Any:
    """What weights are taken relative to, so that gradients stay in the range of one micro-batch's.

    A power of two, so that no bit depends on it. On several ranks it must be the same on all: it is
    that of the first weights, settled once.
    """
    if run.strategy.world_size > 1:
        if run.unit is None:
            largest = max(run.strategy.world.all_gather_object(float(weights[0])))
            run.unit = 2.0 ** math.floor(math.log2(max(largest, 1.0)))
        return run.unit
    first = weights[0]
    if isinstance(first, Tensor):
        bits, exponent = (
            (torch.int64, 0x7FF << 52)
            if first.dtype == torch.float64
            else (torch.int32, 0xFF << 23)
        )
        return (first.clamp(min=1).view(bits) & exponent).view(
            first.dtype
        )  # what it is without its fraction
    return 2.0 ** math.floor(math.log2(max(first, 1)))


def _weighed(loss: Tensor, weight: Any, unit: Any) -> Tensor:
    # A mean over nothing is NaN, and NaN times a weight of 0 would still be NaN.
    part = weight / unit
    if isinstance(weight, Tensor):
        return torch.mul(torch.where(weight > 0, loss, 0.0), part.to(loss.dtype))
    return loss * part if part else torch.where(torch.zeros_like(loss, dtype=torch.bool), loss, 0.0)


def _divisor(run: Run, weights: list[Any], count: int, method: str, *, several: bool) -> Any:
    """What the added-up gradients are still to be divided by: all ranks' weights in units, over the
    ranks.
    """
    where, strategy = f"{name_of(run.task)}.{method}", run.strategy
    if len(weights) != count:
        raise TaskError(
            f"{where} gave a weight for {len(weights)} of {count} micro-batches: give it for all "
            f"or none"
        )
    total = sum(weights[1:], start=weights[0])
    if strategy.world_size > 1:
        if isinstance(total, Tensor):
            total = strategy.dp.all_reduce_tensor(total)
        else:
            (total,) = strategy.dp.all_reduce_sum(total)
    if not isinstance(total, Tensor) and total <= 0:
        raise DataError(f"{where} returned weight={total!r}: the step has nothing to train on")
    if not several:
        return None
    return total / _unit(run, weights) / strategy.dp.size


def freeze_others(run: Run, optimizers: Sequence[str]) -> list[Any]:
    """Switch gradients off for what only other optimizers hold; returns what was switched off."""
    unknown = [name for name in optimizers if name not in run.optimizers]
    if unknown:
        raise TaskError(
            f"there is no optimizer {unknown[0]!r}: the task named {', '.join(run.optimizers)}"
        )
    ours = {
        id(p)
        for name in optimizers
        for group in run.optimizers[name].param_groups
        for p in group["params"]
    }
    frozen = []
    for name, optimizer in run.optimizers.items():
        if name not in optimizers:
            for group in optimizer.param_groups:
                frozen += [p for p in group["params"] if id(p) not in ours and p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    return frozen


def _drain(run: Run, size: int, log: bool) -> None:
    logged = run.task._logged
    for name, value, reduce in logged if log else ():
        run.accumulator.add(
            name, value.detach() if isinstance(value, Tensor) else value, size, reduce
        )
    logged.clear()
