"""Schedules bound to an optimizer. They set its rates, and are saved and resumed with the run."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer

from loopkit.durations import RunLength
from loopkit.errors import LoopkitWarning, OptionError
from loopkit.optim.schedules import Plateau, Schedule, in_steps
from loopkit.optim.torch_scheduler import torch_schedule


class BoundSchedule(Protocol):
    """A schedule bound to an optimizer."""

    def set_length(self, length: RunLength) -> None:
        """Follow a change of the length of the run."""

    def before_update(self, step: int) -> None:
        """Called before the optimizer takes step number ``step``, from 0."""

    def after_update(self) -> None:
        """Called after the optimizer took a step."""

    def after_epoch(self) -> None:
        """Called after a pass over the data."""

    def after_eval(self, metrics: Mapping[str, float]) -> None:
        """Called with the metrics of an evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` returned."""


def bind(
    schedule: Schedule | Plateau | Any, optimizer: Optimizer, length: RunLength
) -> BoundSchedule:
    """Bind a schedule to an optimizer, for ``run.schedules["main"] = bind(...)``.

    If another schedule was bound to the optimizer before, the base rates stay.

    Args:
        schedule: a schedule of ``loopkit.optim``, a scheduler object of torch, or a dict with one;
            see ``torch_schedule``.
        optimizer: the optimizer.
        length: the length of the run, ``run.length``.

    Raises:
        OptionError: the schedule needs a length of the run that is not known.
    """
    if isinstance(schedule, Schedule):
        return RateSchedule(optimizer, schedule, length)
    if isinstance(schedule, Plateau):
        return PlateauSchedule(optimizer, schedule, length)
    return torch_schedule(schedule, optimizer)


class RateSchedule:
    """A Schedule bound to an optimizer: a group has its base rate times the factor of the step."""

    def __init__(self, optimizer: Optimizer, schedule: Schedule, length: RunLength) -> None:
        self.schedule = schedule
        self.factor = schedule.resolve(length)
        self._total = length.steps
        self._rates = Rates(optimizer)

    def set_length(self, length: RunLength) -> None:
        """Follow a change of the length of the run."""
        self.factor = self.schedule.resolve(length)
        self._total = length.steps

    def before_update(self, step: int) -> None:
        """Set the rates for step number ``step``."""
        self._rates.scale(self.factor(step), self.schedule.name, step)

    def after_update(self) -> None:
        """Do nothing: the rates are a function of the step."""

    def after_epoch(self) -> None:
        """Do nothing: ``set_length`` says how many epochs are completed."""

    def after_eval(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: the rates are a function of the step."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the rates depend on besides the step, so that a resume can compare it."""
        return {"name": self.schedule.name, "total": self._total, "rates": list(self._rates.base)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Warn about differences from the saved schedule; the present schedule holds."""
        self._rates.keep()
        change = describe_change(self.schedule.name, self._rates.base, state)
        total = state.get("total", self._total)
        if not change and total != self._total and self.schedule.depends_on_total():
            change = (
                f"the schedule {self.schedule.name!r} was made for a run of {total} steps and now "
                f"for one of {self._total}: learning rates differ from those of the saved run"
            )
        if change:
            warnings.warn(change, LoopkitWarning, stacklevel=2)


class PlateauSchedule:
    """``reduce_on_plateau`` bound to an optimizer.

    Attributes:
        metric: the name of the metric that it needs.
        factor: the present factor of the base rates.
        best: the best value so far.
        waited: evaluations without an improvement.
        resting: evaluations that do not count, after a reduction.
    """

    def __init__(self, optimizer: Optimizer, plateau: Plateau, length: RunLength) -> None:
        self.plateau = plateau
        self.monitor = plateau.monitor()
        self.metric = self.monitor.name
        self.factor = 1.0
        self.best: float | None = None
        self.waited = 0
        self.resting = 0
        self._warmup = in_steps(plateau.warmup, length, "reduce_on_plateau(warmup=)")
        self._rates = Rates(optimizer)

    def set_length(self, length: RunLength) -> None:
        """Follow a change of the length of the run."""
        self._warmup = in_steps(self.plateau.warmup, length, "reduce_on_plateau(warmup=)")

    def before_update(self, step: int) -> None:
        """Set the rates for step number ``step``."""
        factor = self.factor * min(1.0, step / self._warmup if self._warmup else 1.0)
        self._rates.scale(factor, self.plateau.name, step)

    def after_update(self) -> None:
        """Do nothing: only evaluations count."""

    def after_epoch(self) -> None:
        """Do nothing: only evaluations count."""

    def after_eval(self, metrics: Mapping[str, float]) -> None:
        """Lower the factor if the metric has not improved for longer than ``patience``.

        Raises:
            MetricError: the evaluation gave no such metric.
        """
        plateau = self.plateau
        value = self.monitor.value(metrics, "reduce_on_plateau()")
        if self.monitor.is_better(value, self.best, threshold=plateau.threshold):
            self.best = value
            self.waited = 0
        else:
            self.waited += 1
        if self.resting:
            self.resting -= 1
            self.waited = 0
        if self.waited > plateau.patience:
            self.factor = max(self.factor * plateau.factor, plateau.floor)
            self.resting = plateau.cooldown
            self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the factor, the best value, and the counts of evaluations."""
        return {
            "name": self.plateau.name,
            "rates": list(self._rates.base),
            "factor": self.factor,
            "best": self.best,
            "waited": self.waited,
            "resting": self.resting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the saved factor, and warn about differences from the saved schedule."""
        self._rates.keep()
        if state.get("name") == self.plateau.name:
            self.factor = state["factor"]
            self.best = None if state["best"] is None else float(state["best"])
            self.waited = state["waited"]
            self.resting = state["resting"]
        change = describe_change(self.plateau.name, self._rates.base, state)
        if change:
            warnings.warn(change, LoopkitWarning, stacklevel=2)


class Rates:
    """The learning rates of an optimizer's groups, which one schedule sets.

    The rate of a group before any schedule changed it is kept in the group as "initial_lr", as
    torch's schedulers do.

    Attributes:
        base: each group's rate before any schedule changed it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        # Not its groups: loading a state replaces them.
        self._optimizer = optimizer
        groups = optimizer.param_groups
        self.base: list[float] = [group.setdefault("initial_lr", group["lr"]) for group in groups]
        self._set = [group["lr"] for group in groups]

    def scale(self, factor: float, name: str, step: int) -> None:
        """Set each group's rate to its base rate times ``factor``.

        Args:
            factor: the factor of the schedule.
            name: the schedule, for messages.
            step: the number of the step, from 0.

        Raises:
            OptionError: something else has set a rate since the last call.
        """
        known = self._set
        for number, (group, base) in enumerate(zip(self._optimizer.param_groups, self.base)):
            if group["lr"] is not known[number] and group["lr"] != known[number]:
                raise OptionError(
                    f"the learning rate was set to {group['lr']:g} before step {step + 1}, and the "
                    f"schedule {name!r} sets it to {base * factor:g} in this step: leave schedule= "
                    "out, or replace the schedule, as run.schedules['main'] = bind(constant(), "
                    "optimizer, run.length). bind takes group['initial_lr'] as the base rate"
                )
            group["lr"] = known[number] = base * factor

    def keep(self) -> None:
        """Write the base rates into the groups again, after the load of a state replaced them."""
        groups = self._optimizer.param_groups
        for group, rate in zip(groups, self.base):
            group["initial_lr"] = rate
        self._set = [group["lr"] for group in groups]


def describe_change(name: str, rates: list[float], saved: Mapping[str, Any]) -> str:
    """Return a sentence about what the user changed since a schedule was saved; "" for nothing."""
    saved_name = saved.get("name")
    saved_rates = list(saved.get("rates", rates))
    if saved_name is not None and saved_name != name:
        return (
            f"the schedule was {saved_name!r} when this checkpoint was saved and is now {name!r}: "
            "learning rates follow the present schedule"
        )
    if saved_rates != list(rates):
        before = ", ".join(f"{rate:g}" for rate in saved_rates)
        now = ", ".join(f"{rate:g}" for rate in rates)
        return (
            f"base learning rates were {before} when this checkpoint was saved and are now {now}: "
            "the present ones hold"
        )
    return ""
