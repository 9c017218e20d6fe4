"""What ``Task.optimizers()`` may return: an optimizer, several by name, or one of Lightning's shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from loopkit.errors import TaskError
from loopkit.optim.specs import OptimizerSpec

_ACCEPTED = (
    "give a loopkit.optim spec, a torch optimizer, a pair of a torch optimizer and a scheduler, or "
    "a dict of these by name"
)


def named_pairs(returned: Any, where: str) -> dict[str, tuple[Any, Any]]:
    """Return each optimizer or spec with its schedule or None, by name; a single one is "main".

    A scheduler in one of Lightning's shapes is stepped after each epoch, as it is there, unless the
    dict around it has ``"interval": "step"``.

    Args:
        returned: what ``Task.optimizers()`` returned.
        where: the method, for messages.

    Raises:
        TaskError: it has no accepted shape.
    """
    returned = _from_lightning(returned, where)
    named = dict(returned) if isinstance(returned, Mapping) else {"main": returned}
    if not named:
        raise TaskError(f"{where} returned an empty dict: name at least one optimizer")
    flat = _flattened(named)
    return {name: _pair(_from_lightning(value, where), where) for name, value in flat.items()}


def _pair(given: Any, where: str) -> tuple[Any, Any]:
    optimizer, schedule = given, None
    if isinstance(given, tuple) and len(given) == 2:
        optimizer, schedule = given
        if isinstance(schedule, (list, tuple)):
            raise TaskError(
                f"{where} returned an optimizer with a {type(schedule).__name__} of schedulers: "
                "give one scheduler, as (optimizer, scheduler); torch's ChainedScheduler and "
                "SequentialLR make one of several"
            )
        if isinstance(schedule, Optimizer):
            raise _several(2, where)
    if not isinstance(optimizer, (Optimizer, OptimizerSpec)):
        raise TaskError(f"{where} returned {type(optimizer).__name__}: {_ACCEPTED}")
    return optimizer, schedule


def _from_lightning(returned: Any, where: str) -> Any:
    """Return one of loopkit's shapes for one of Lightning's; anything else as it is."""
    if isinstance(returned, Mapping) and _is_config(returned):
        scheduler = returned.get("lr_scheduler")
        return returned["optimizer"], _by_epoch(scheduler, returned.get("monitor"))
    lists = isinstance(returned, (list, tuple)) and len(returned) == 2
    if lists and all(isinstance(part, (list, tuple)) for part in returned):
        optimizers, schedulers = returned
        if len(optimizers) != 1:
            raise _several(len(optimizers), where)
        if len(schedulers) > 1:
            raise TaskError(
                f"{where} returned {len(schedulers)} schedulers for one optimizer: torch's "
                "ChainedScheduler and SequentialLR make one of several"
            )
        return optimizers[0], _by_epoch(schedulers[0]) if schedulers else None
    if isinstance(returned, list):
        if len(returned) != 1:
            raise _several(len(returned), where)
        return _from_lightning(returned[0], where)
    return returned


def _is_config(returned: Mapping[str, Any]) -> bool:
    extra = returned.keys() - {"optimizer"}
    return "optimizer" in returned and bool(extra) and extra <= {"lr_scheduler", "monitor"}


def _by_epoch(scheduler: Any, monitor: str | None = None) -> Any:
    if scheduler is None:
        return None
    config = dict(scheduler) if isinstance(scheduler, Mapping) else {"scheduler": scheduler}
    return config if monitor is None else {"monitor": monitor, **config}


def _several(count: int, where: str) -> TaskError:
    return TaskError(
        f"{where} returned {count} optimizers without names: return a dict, as {{'generator': …, "
        "'discriminator': …}, each value an optimizer or (optimizer, scheduler)"
    )


def _flattened(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return optimizers by name, where one name may hold several: "generator_muon"."""
    flat: dict[str, Any] = {}
    for name, given in named.items():
        if isinstance(given, Mapping) and given and not _is_config(given):
            flat |= {f"{name}_{part}": value for part, value in given.items()}
        else:
            flat[name] = given
    return flat
