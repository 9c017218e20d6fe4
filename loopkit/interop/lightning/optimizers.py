"""What a LightningModule's ``configure_optimizers`` returns: optimizers, and schedulers to step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from loopkit.errors import TaskError, nearest

_SHAPES = (
    "an optimizer, a list of optimizers, two lists (optimizers, schedulers), or a dict with "
    "'optimizer' and 'lr_scheduler', or a list of such dicts"
)


@dataclass
class SchedulerConfig:
    """A scheduler, and when it is stepped. The names are those of Lightning's dict.

    Attributes:
        scheduler: a scheduler of torch, or an object with its methods.
        interval: "epoch" or "step".
        frequency: after how many epochs or batches it is stepped once.
        monitor: the logged name that a scheduler of the plateau kind watches.
        strict: whether a missing value of it is an error.
        reduce_on_plateau: whether ``step`` takes the watched value.
        name: accepted, for monitors of learning rates.
    """

    scheduler: Any
    interval: str = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    reduce_on_plateau: bool = False
    name: str | None = None


_KEYS = tuple(SchedulerConfig.__annotations__)


class LightningSchedulers:
    """The schedulers of a LightningModule, stepped when Lightning's Trainer steps them.

    Args:
        configs: the schedulers, as ``parse_optimizers`` returned them.
    """

    def __init__(self, configs: Sequence[SchedulerConfig] = ()) -> None:
        self.configs = list(configs)

    def step(self, interval: str, index: int, monitored: Callable[[str], Any]) -> None:
        """Step the schedulers of one interval that are due.

        Args:
            interval: "step" or "epoch".
            index: the number of the batch in its epoch, or of the epoch, from 0.
            monitored: returns a logged value by name; None where there is none.

        Raises:
            TaskError: a value that a scheduler watches was not logged.
        """
        for config in self.configs:
            if config.interval != interval or (index + 1) % config.frequency:
                continue
            if not config.reduce_on_plateau:
                config.scheduler.step()
                continue
            value = monitored(config.monitor or "")
            if value is not None:
                config.scheduler.step(value)
            elif config.strict:
                raise TaskError(
                    f"{type(config.scheduler).__name__} watches {config.monitor!r}, which nothing "
                    f"has logged by the end of this {interval}: log it, or give 'strict': False"
                )

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each scheduler."""
        return [dict(config.scheduler.state_dict()) for config in self.configs]

    def load_state_dict(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Give each scheduler its state."""
        for config, state in zip(self.configs, states):
            config.scheduler.load_state_dict(dict(state))


def parse_optimizers(
    returned: Any, where: str, *, manual: bool
) -> tuple[list[Optimizer], list[SchedulerConfig]]:
    """Return the optimizers and schedulers of what ``configure_optimizers`` returned.

    Args:
        returned: its value.
        where: the method, for messages.
        manual: whether the module steps optimizers and schedulers itself.

    Raises:
        TaskError: the value has no shape that Lightning accepts.
    """
    pairs = _pairs(returned, where)
    optimizers = [optimizer for optimizer, _ in pairs if optimizer is not None]
    if not optimizers:
        raise TaskError(f"{where} returned {returned!r}: return {_SHAPES}")
    for optimizer in optimizers:
        if not isinstance(optimizer, Optimizer):
            raise TaskError(f"{where} returned a {type(optimizer).__name__}: return {_SHAPES}")
    if len(optimizers) > 1 and not manual:
        raise TaskError(
            f"{where} returned {len(optimizers)} optimizers, which Lightning 2 takes in manual "
            "optimization alone: set self.automatic_optimization = False"
        )
    configs = [_config(given, where, manual=manual) for _, given in pairs if given is not None]
    for config in configs:
        if getattr(config.scheduler, "optimizer", optimizers[0]) not in optimizers:
            raise TaskError(
                f"{where} returned a {type(config.scheduler).__name__} of an optimizer that it did "
                "not return"
            )
    return optimizers, configs


def _pairs(returned: Any, where: str) -> list[tuple[Any, Any]]:
    """Return pairs of an optimizer and a scheduler; either may be None."""
    if isinstance(returned, Optimizer):
        return [(returned, None)]
    if isinstance(returned, Mapping):
        return [_from_dict(returned, where)]
    if isinstance(returned, (list, tuple)):
        if len(returned) == 2 and all(isinstance(part, (list, tuple)) for part in returned):
            optimizers, schedulers = returned
            return [(o, None) for o in optimizers] + [(None, s) for s in schedulers]
        if all(isinstance(part, Mapping) for part in returned):
            return [_from_dict(part, where) for part in returned]
        return [(optimizer, None) for optimizer in returned]
    return [(returned, None)] if returned is not None else []


def _from_dict(given: Mapping[str, Any], where: str) -> tuple[Any, Any]:
    if "optimizer" not in given:
        raise TaskError(f"{where} returned a dict without 'optimizer': return {_SHAPES}")
    known = ("optimizer", "lr_scheduler", "monitor", "frequency")
    for key in given:
        if key not in known:
            raise TaskError(f"{where} returned a dict with {key!r}.{nearest(str(key), known)}")
    scheduler, monitor = given.get("lr_scheduler"), given.get("monitor")
    if scheduler is not None and monitor is not None:
        config = dict(scheduler) if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
        scheduler = {"monitor": monitor, **config}
    return given["optimizer"], scheduler


def _config(given: Any, where: str, *, manual: bool) -> SchedulerConfig:
    settings = dict(given) if isinstance(given, Mapping) else {"scheduler": given}
    for key in settings:
        if key not in _KEYS:
            raise TaskError(
                f"{where} returned a scheduler with {key!r}.{nearest(str(key), _KEYS)} It takes "
                f"{', '.join(_KEYS)}"
            )
    scheduler = settings.get("scheduler")
    plateau = isinstance(scheduler, ReduceLROnPlateau)
    config = SchedulerConfig(**{"scheduler": None, "reduce_on_plateau": plateau, **settings})
    name = type(scheduler).__name__
    if not callable(getattr(scheduler, "step", None)):
        raise TaskError(f"{where} returned a {name} as scheduler, which has no step()")
    if not callable(getattr(scheduler, "state_dict", None)):
        raise TaskError(
            f"{where} returned a {name}, which has no state_dict(): a resume could not continue it"
        )
    if config.interval not in ("step", "epoch"):
        raise TaskError(
            f"{where}: a scheduler's interval is 'step' or 'epoch', not {config.interval!r}"
        )
    if plateau and config.monitor is None and not manual:
        raise TaskError(
            f"{where} returned a {name} that watches nothing: give the dict around it a 'monitor', "
            "the name of a logged value"
        )
    return config
