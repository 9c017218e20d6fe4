"""Schedules at work on an optimizer: set before each update, told of evaluations, saved and
resumed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer

from loopkit.durations import RunLength
from loopkit.errors import LoopkitWarning
from loopkit.monitor import metric_value
from loopkit.optim.schedules import Plateau, Schedule, in_steps


class BoundSchedule(Protocol):
    """A schedule at work on an optimizer."""

    def before_update(self, step: int) -> None:
        """The optimizer is about to take its step number ``step``, from 0."""

    def after_update(self) -> None:
        """The optimizer has taken a step."""

    def after_eval(self, metrics: Mapping[str, float]) -> None:
        """An evaluation gave these metrics."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


def bind(
    schedule: Schedule | Plateau | Any, optimizer: Optimizer, length: RunLength
) -> BoundSchedule:
    """A schedule, or a scheduler object of torch's, put to work: for ``run.schedules["main"] =
    bind(...)``.

    Rates that are already scheduled keep the base rates they started from.

    Raises:
        OptionError: the schedule needs a length that the run does not have.
    """
    if isinstance(schedule, Schedule):
        return RateSchedule(optimizer, schedule, length)
    if isinstance(schedule, Plateau):
        return PlateauSchedule(optimizer, schedule, length)
    return TorchSchedule(schedule)


class RateSchedule:
    """A Schedule bound to an optimizer: each group's rate is its base rate times the factor of the
    step.
    """

    def __init__(self, optimizer: Optimizer, schedule: Schedule, length: RunLength) -> None:
        self.schedule = schedule
        self.factor = schedule.resolve(length)
        self._total = length.steps
        self._optimizer = (
            optimizer  # whose groups are replaced when its state is loaded: keep none of them
        )
        self._base_rates = base_rates(optimizer)

    def before_update(self, step: int) -> None:
        """Set the rates for step number ``step``."""
        factor = self.factor(step)
        for group, base in zip(self._optimizer.param_groups, self._base_rates):
            group["lr"] = base * factor

    def after_update(self) -> None:
        """Nothing: rates are a function of the step."""

    def after_eval(self, metrics: Mapping[str, float]) -> None:
        """Nothing: rates are a function of the step."""

    def state_dict(self) -> dict[str, Any]:
        """What the rates depend on besides the step, so that a change of it can be told."""
        return {"name": self.schedule.name, "total": self._total, "rates": list(self._base_rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Say, as a LoopkitWarning, what differs from the run that was saved; what is given now
        holds.
        """
        keep_base_rates(self._optimizer, self._base_rates)
        said = compare(self.schedule.name, self._base_rates, state)
        total = state.get("total", self._total)
        if not said and total != self._total and self.schedule.depends_on_total():
            said = (
                f"the schedule {self.schedule.name!r} was made for a run of {total} steps and now "
                f"for one of "
                f"{self._total}: learning rates differ from those of the run that was saved"
            )
        if said:
            warnings.warn(said, LoopkitWarning, stacklevel=2)


class PlateauSchedule:
    """``reduce_on_plateau`` bound to an optimizer. Its state is the factor so far and what it waits
    for.
    """

    def __init__(self, optimizer: Optimizer, plateau: Plateau, length: RunLength) -> None:
        self.plateau = plateau
        self.monitor = plateau.monitor()
        self.watches = self.monitor.name
        self.factor = 1.0
        self.best: float | None = None
        self.waited = 0
        self.resting = 0
        self._warmup = in_steps(plateau.warmup, length, "reduce_on_plateau(warmup=)")
        self._optimizer = optimizer
        self._base_rates = base_rates(optimizer)

    def before_update(self, step: int) -> None:
        """Set the rates for step number ``step``."""
        factor = self.factor * min(1.0, step / self._warmup if self._warmup else 1.0)
        for group, base in zip(self._optimizer.param_groups, self._base_rates):
            group["lr"] = base * factor

    def after_update(self) -> None:
        """Nothing: only evaluations count."""

    def after_eval(self, metrics: Mapping[str, float]) -> None:
        """Lower the factor if the metric has not got better for longer than ``patience``.

        Raises:
            MetricError: the evaluation gave no such metric.
        """
        plateau = self.plateau
        value = self.monitor.value(metrics, "reduce_on_plateau()")
        if self.monitor.is_better(value, self.best, threshold=plateau.threshold):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.resting:
            self.resting -= 1
            self.waited = 0
        if self.waited > plateau.patience:
            self.factor = max(self.factor * plateau.factor, plateau.floor)
            self.resting, self.waited = plateau.cooldown, 0

    def state_dict(self) -> dict[str, Any]:
        """The factor so far, the best value, and how long it has waited."""
        state = {
            "factor": self.factor,
            "best": self.best,
            "waited": self.waited,
            "resting": self.resting,
        }
        return {"name": self.plateau.name, "rates": list(self._base_rates), **state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the saved factor; a change is said as a LoopkitWarning."""
        keep_base_rates(self._optimizer, self._base_rates)
        if state.get("name") == self.plateau.name:
            self.factor, self.best = state["factor"], state["best"]
            self.waited, self.resting = state["waited"], state["resting"]
        said = compare(self.plateau.name, self._base_rates, state)
        if said:
            warnings.warn(said, LoopkitWarning, stacklevel=2)


class TorchSchedule:
    """A scheduler object of torch's: stepped after each optimizer step, or after evaluations if it
    wants a metric.
    """

    def __init__(self, scheduler: Any, metric: str = "eval/loss") -> None:
        self.scheduler = scheduler
        self.watches = metric if type(scheduler).__name__ == "ReduceLROnPlateau" else None

    def before_update(self, step: int) -> None:
        """Nothing: torch's schedulers set the rate after a step."""

    def after_update(self) -> None:
        """Advance by one step."""
        if self.watches is None:
            self.scheduler.step()

    def after_eval(self, metrics: Mapping[str, float]) -> None:
        """Show it the metric it waits for.

        Raises:
            MetricError: the evaluation gave no such metric.
        """
        if self.watches is not None:
            self.scheduler.step(metric_value(metrics, self.watches, "ReduceLROnPlateau"))

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's own state."""
        return dict(self.scheduler.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put the scheduler's own state back."""
        self.scheduler.load_state_dict(dict(state))


def base_rates(optimizer: Optimizer) -> list[float]:
    """Each group's rate before any schedule touched it, marked as torch's schedulers mark it."""
    return [group.setdefault("initial_lr", group["lr"]) for group in optimizer.param_groups]


def keep_base_rates(optimizer: Optimizer, rates: list[float]) -> None:
    """Mark ``rates`` anew after a load, which brought the saved marks."""
    for group, rate in zip(optimizer.param_groups, rates):
        group["initial_lr"] = rate


def compare(name: str, rates: list[float], saved: Mapping[str, Any]) -> str:
    """What the user changed between a saved schedule and this one, in a sentence; "" for nothing."""
    was, before = saved.get("name"), saved.get("rates", rates)
    if was is not None and was != name:
        return f"the schedule was {was!r} when this checkpoint was saved and is now {name!r}: rates follow the latter"
    if list(before) != list(rates):
        return (
            f"base learning rates were {', '.join(f'{rate:g}' for rate in before)} when this "
            f"checkpoint was saved "
            f"and are now {', '.join(f'{rate:g}' for rate in rates)}, which hold from here"
        )
    return ""
