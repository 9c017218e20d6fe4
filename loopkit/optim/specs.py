"""Optimizers as specs: what a Task returns, built over its parameters once they are placed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.durations import RunLength
from loopkit.errors import OptionError, TaskError
from loopkit.foreign_names import OPTIMIZER_ARGUMENTS, SCHEDULE_NAMES
from loopkit.keywords import unknown_keyword
from loopkit.optim.groups import (
    Group,
    check_complete,
    check_number,
    check_pattern,
    partition,
    select,
)
from loopkit.optim.lr_schedulers import BoundSchedule, bind
from loopkit.optim.schedule_free import schedule_free_optimizers
from loopkit.optim.schedules import Plateau, Schedule
from loopkit.task import name_of

_FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}


@dataclass(frozen=True)
class Spec:
    """A torch optimizer to be built over a task's parameters, fused where torch has one kernel for
    all of them.

    Attributes:
        optimizer: the class.
        lr: the base learning rate.
        weight_decay: of the groups that decay.
        schedule: the rate over the run; None keeps it.
        no_decay: "auto" spares biases and norms; a sequence of names' regular expressions; ()
            spares nothing.
        params: which parameters: None for all, a regular expression, a module, parameters, or a
            function of the task that gives names.
        options: further arguments of the class.
        groups: settings for parameters by name, in order: the first that matches holds.
        layer_decay: what each layer's rate is multiplied by to get the one below: 0.95, with the
            head at ``lr``.
    """

    optimizer: type[Optimizer]
    lr: float
    weight_decay: float = 0.0
    schedule: Schedule | Plateau | None = None
    no_decay: str | Sequence[str] = "auto"
    params: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[Group] = ()
    layer_decay: float | None = None

    def __post_init__(self) -> None:
        name = self.optimizer.__name__
        check_number(self.lr, f"{name}(lr=)")
        check_number(self.weight_decay, f"{name}(weight_decay=)")
        if self.schedule is not None and not isinstance(self.schedule, (Schedule, Plateau)):
            known = SCHEDULE_NAMES.get(str(self.schedule), "such as cosine()")
            raise OptionError(
                f"{name}(schedule={self.schedule!r}): give one of loopkit.optim's, {known}"
            )
        for pattern in [self.no_decay] if isinstance(self.no_decay, str) else self.no_decay:
            check_pattern(pattern, f"{name}(no_decay=)")
        if any(not isinstance(group, Group) for group in self.groups):
            raise OptionError(
                f"{name}(groups=...): give a sequence of Group(match=..., lr=..., weight_decay=...)"
            )
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise OptionError(
                f"{name}(layer_decay={self.layer_decay!r}): give a factor from 0 to 1, such as 0.95"
            )
        self._check_options(name)

    def _check_options(self, name: str) -> None:
        accepted = arguments(self.optimizer)
        if accepted is None:
            return
        for option in self.options:
            if option not in accepted:
                known = sorted({*accepted, *SETTINGS})
                foreign = {
                    theirs: ours
                    for theirs, ours in OPTIMIZER_ARGUMENTS.items()
                    if ours.partition("=")[0] in known
                }
                raise unknown_keyword(name, option, known, foreign)
        if self.weight_decay and "weight_decay" not in accepted:
            raise OptionError(
                f"{name}(weight_decay={self.weight_decay!r}): this optimizer has no weight decay"
            )

    def build(self, task: nn.Module) -> Optimizer:
        """The optimizer over ``task``'s parameters, in the groups that decay, layers and names
        make.

        Raises:
            OptionError: ``params`` or a group picks nothing, or the class refuses an option.
        """
        name = self.optimizer.__name__
        chosen = select(task, self.params, name)
        groups = partition(
            task,
            chosen,
            lr=self.lr,
            weight_decay=self.weight_decay,
            no_decay=self.no_decay,
            groups=self.groups,
            layer_decay=self.layer_decay,
        )
        options = {
            option: value
            for option, value in self.options.items()
            if option != "fused" or value is not None
        }
        fits = all(_fuses(self.optimizer, parameter) for parameter in chosen.values())
        if (
            fits
            and "fused" in (arguments(self.optimizer) or ())
            and not {"fused", "foreach"} & options.keys()
        ):
            with suppress(
                RuntimeError
            ):  # where this version of torch has no such kernel for the device
                return self._make([dict(group) for group in groups], {**options, "fused": True})
        try:
            return self._make(groups, options)
        except RuntimeError as error:
            raise OptionError(f"{name} cannot be built: {error}") from error

    def _make(self, groups: list[dict[str, Any]], options: Mapping[str, Any]) -> Optimizer:
        try:
            return self.optimizer(groups, lr=self.lr, **options)  # type: ignore[call-arg]
        except (TypeError, ValueError) as error:
            raise OptionError(f"{self.optimizer.__name__} cannot be built: {error}") from error


def _fuses(optimizer: type[Optimizer], parameter: Tensor) -> bool:
    """Whether torch's fused kernel is to be had for ``parameter``, and right."""
    if (
        parameter.device.type == "cpu"
        and parameter.element_size() == 2
        and issubclass(optimizer, torch.optim.SGD)
    ):
        # up to 2.13 it leaves whole vectors of 16-bit numbers as they were (pytorch issue 191763)
        return False
    return parameter.device.type in _FUSED_DEVICES and parameter.is_floating_point()


SETTINGS = ("lr", "weight_decay", "schedule", "no_decay", "params", "groups", "layer_decay")


def arguments(optimizer: type[Optimizer]) -> dict[str, Any] | None:
    """The class's arguments by name with their defaults; None where it takes any name."""
    parameters = list(inspect.signature(optimizer.__init__).parameters.values())[
        2:
    ]  # after self and params
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: p.default for p in parameters}


def make_optimizers(task: Any) -> dict[str, tuple[Optimizer, Any]]:
    """What ``task.optimizers()`` returned, built: each with its schedule or None, by name ("main"
    for a single one).

    Raises:
        TaskError: it returned something else, or a trainable parameter is in no group.
        OptionError: a spec cannot be built.
    """
    returned = task.optimizers()
    named = dict(returned) if isinstance(returned, Mapping) else {"main": returned}
    if not named:
        raise TaskError(
            f"{name_of(task)}.optimizers() returned an empty dict: name at least one optimizer"
        )
    made: dict[str, tuple[Optimizer, Any]] = {}
    for name, given in _flat(named).items():
        schedule = None
        if isinstance(given, tuple) and len(given) == 2:
            given, schedule = given
        if isinstance(given, Spec):
            schedule = schedule or given.schedule
            given = given.build(task)
        if not isinstance(given, Optimizer):
            raise TaskError(
                f"{name_of(task)}.optimizers() returned {type(given).__name__}: give a "
                "loopkit.optim spec, a torch optimizer, or a dict of these by name"
            )
        made[name] = given, schedule
    check_complete(task, {name: optimizer for name, (optimizer, _) in made.items()})
    return made


def build_optimizers(
    task: Any, length: RunLength
) -> tuple[dict[str, Optimizer], dict[str, BoundSchedule]]:
    """What ``task.optimizers()`` returned, ready to train: optimizers and bound schedules by name.

    Raises:
        TaskError: it returned something else, or a trainable parameter is in no group.
        OptionError: a spec cannot be built, or its schedule needs a length the run does not have.
    """
    made = make_optimizers(task)
    optimizers = {name: optimizer for name, (optimizer, _) in made.items()}
    for switcher in schedule_free_optimizers(optimizers.values()):
        switcher.train()
    schedules = {
        name: bind(schedule, made[name][0], length)
        for name, (_, schedule) in made.items()
        if schedule
    }
    return optimizers, schedules


def _flat(named: Mapping[str, Any]) -> dict[str, Any]:
    """Optimizers by name, where one name may hold several, as ``Muon`` does: "generator_muon"."""
    flat: dict[str, Any] = {}
    for name, given in named.items():
        parts = given.items() if isinstance(given, Mapping) else ()
        flat |= {f"{name}_{part}": value for part, value in parts} or {name: given}
    return flat
