"""Parameter groups: what decays and what does not, rates by layer or by name, and the check that
none is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from loopkit.errors import OptionError, TaskError
from loopkit.keywords import checks_keywords
from loopkit.optim.layers import dimensions, layer_levels
from loopkit.task import name_of

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@checks_keywords
@dataclass(frozen=True)
class Group:
    """Settings of their own for the parameters whose names match.

    Attributes:
        match: a regular expression searched for in the names.
        lr: their base rate, as it stands; None takes the optimizer's, scaled by layer where layers
            decay.
        weight_decay: of all of them, biases and norms included; None treats them as the others.
        options: further settings of the optimizer that hold for a group, such as ``{"betas": (0.9,
            0.95)}``.
    """

    match: str
    lr: float | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_pattern(self.match, "Group(match=)")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if value is not None:
                check_number(value, f"Group(match={self.match!r}, {name}=)")


def partition(
    task: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    no_decay: str | Sequence[str] = "auto",
    groups: Sequence[Group] = (),
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """The groups that ``chosen`` falls into, the highest rate first; each has its "name".

    Raises:
        OptionError: a Group matches no parameter that an earlier one has left, or no layers can be
            told.
    """
    spared = _spared(task, no_decay) if weight_decay else set()
    levels = layer_levels(task) if layer_decay is not None else {}
    top = max(levels.values(), default=0)
    buckets: dict[Any, dict[str, Any]] = {}
    used: set[int] = set()
    for name, parameter in chosen.items():
        number = next((i for i, group in enumerate(groups) if re.search(group.match, name)), None)
        own = Group("") if number is None else groups[number]
        used |= set() if number is None else {number}
        level = levels.get(name, top)
        rate = lr * (layer_decay or 1.0) ** (top - level) if own.lr is None else own.lr
        decay = (
            own.weight_decay
            if own.weight_decay is not None
            else 0.0
            if name in spared
            else weight_decay
        )
        key = (number, level if own.lr is None else top, decay)
        if key not in buckets:
            layer = f"layer_{level}" if levels and own.lr is None else ""
            label = _label(
                own.match, layer, "" if not weight_decay else "decay" if decay else "no_decay"
            )
            buckets[key] = {
                "params": [],
                "lr": rate,
                "weight_decay": decay,
                "name": label,
                **own.options,
            }
        buckets[key]["params"].append(parameter)
    for number, group in enumerate(groups):
        if number not in used:
            raise OptionError(
                f"Group(match={group.match!r}) is the first to match no parameter of "
                f"{name_of(task)}: see the names with named_parameters()"
            )
    return sorted(buckets.values(), key=lambda group: (-group["lr"], group["weight_decay"] == 0))


def _label(match: str, layer: str, decay: str) -> str:
    """A group's name, fit for a log: "decay", "no_decay", "layer_3/no_decay", "^head"; "all" for
    the only one.
    """
    place = [word for word in (match, layer) if word]
    return "/".join([*place, decay] if decay == "no_decay" or not place else place) or "all"


def _spared(task: nn.Module, no_decay: str | Sequence[str]) -> set[str]:
    if no_decay == "auto":
        return spared_from_decay(task)
    patterns = [no_decay] if isinstance(no_decay, str) else no_decay
    return {
        n for n, _ in task.named_parameters() if any(re.search(pattern, n) for pattern in patterns)
    }


def spared_from_decay(task: nn.Module) -> set[str]:
    """Names of the parameters that weight decay spares: of fewer than two dimensions, or of a norm
    layer.
    """
    spared = {name for name, parameter in task.named_parameters() if dimensions(parameter) < 2}
    for prefix, module in task.named_modules():
        if isinstance(module, _NORMS) or "norm" in type(module).__name__.lower():
            spared |= {
                f"{prefix}.{name}" if prefix else name
                for name, _ in module.named_parameters(recurse=False)
            }
    return spared


def select(task: nn.Module, chosen: Any, what: str) -> dict[str, nn.Parameter]:
    """The trainable parameters of ``task`` that ``chosen`` picks, by name, in the task's order.

    Args:
        chosen: None for all; a regular expression searched for in the names; a module of the task;
            parameters; or a function of the task that gives names.

    Raises:
        OptionError: it picks none, or a parameter that is not the task's.
    """
    trainable = {name: p for name, p in task.named_parameters() if p.requires_grad}
    if chosen is None:
        found = trainable
    elif isinstance(chosen, str):
        found = {name: p for name, p in trainable.items() if re.search(chosen, name)}
    elif callable(chosen) and not isinstance(chosen, nn.Module):
        names = set(chosen(task))
        found = {name: p for name, p in trainable.items() if name in names}
    else:
        wanted: Iterable[Any] = chosen.parameters() if isinstance(chosen, nn.Module) else chosen
        ids = {id(parameter) for parameter in wanted}
        strangers = ids - {id(p) for p in task.parameters()}
        if strangers:
            raise OptionError(
                f"{what}(params=...) holds {len(strangers)} parameter(s) that are not the task's"
            )
        found = {name: p for name, p in trainable.items() if id(p) in ids}
    if not found:
        picked = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", "...")
        raise OptionError(
            f"{what}(params={picked!r}) picks no trainable parameter of {name_of(task)}"
        )
    return found


def check_complete(task: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """Refuse optimizers that leave a trainable parameter out, or hold one that is not the task's.

    Raises:
        TaskError: with the names of the parameters in no group.
    """
    held = {
        id(p)
        for optimizer in optimizers.values()
        for group in optimizer.param_groups
        for p in group["params"]
    }
    name = name_of(task)
    left_out = [n for n, p in task.named_parameters() if p.requires_grad and id(p) not in held]
    if left_out:
        shown = ", ".join(left_out[:8]) + (
            f" and {len(left_out) - 8} more" if len(left_out) > 8 else ""
        )
        raise TaskError(
            f"{name}.optimizers() leaves {len(left_out)} trainable parameter(s) in no group: "
            f"{shown}. "
            "Add them to a group, or set requires_grad_(False) on them"
        )
    strangers = held - {id(p) for p in task.parameters()}
    if strangers:
        raise TaskError(
            f"{name}.optimizers() holds {len(strangers)} parameter(s) that are not the task's: "
            "make optimizers from self.parameters(), inside optimizers()"
        )


def check_number(value: object, what: str) -> None:
    """Refuse what is no number of at least 0.

    Raises:
        OptionError: naming ``what`` and the value.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0:
        raise OptionError(f"{what[:-1]}{value!r}): give a number of at least 0")


def check_pattern(pattern: object, what: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        OptionError: naming ``what`` and the reason.
    """
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        raise OptionError(f"{what[:-1]}{pattern!r}) is no regular expression: {error}") from error
