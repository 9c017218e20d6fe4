"""Parameter groups: weight decay and rates by layer or by name; no parameter is left out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from loopkit.checks import checked_number, shown
from loopkit.errors import OptionError, TaskError
from loopkit.keywords import checks_keywords
from loopkit.optim.layers import dimensions, layer_levels
from loopkit.task import name_of

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@checks_keywords
@dataclass(frozen=True)
class ParamGroup:
    """Settings for the parameters with a matching name.

    Example::

        AdamW(lr=1e-3, groups=[ParamGroup("^head", lr=1e-2), ParamGroup("norm", weight_decay=0.0)])

    Args:
        match: a regular expression that is searched for in the names of parameters.
        lr: the base rate of the group, used as given. None takes the rate of the optimizer, scaled
            by layer under ``layer_decay``.
        weight_decay: the weight decay of the group, biases and norms included. None decays what
            the optimizer decays.
        options: further options of the optimizer for this group, such as
            ``{"betas": (0.9, 0.95)}``.

    Raises:
        OptionError: ``match`` is no regular expression, or a number is negative.
    """

    match: str
    lr: float | None = None
    weight_decay: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_pattern(self.match, "ParamGroup(match=)")
        for name in ("lr", "weight_decay"):
            option = f"ParamGroup(match={self.match!r}, {name}=)"
            checked_number(getattr(self, name), option, at_least=0, or_none=True)


def partition(
    task: nn.Module,
    chosen: Mapping[str, nn.Parameter],
    *,
    lr: float,
    weight_decay: float,
    no_decay: str | Sequence[str] = "auto",
    groups: Sequence[ParamGroup] = (),
    layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Divide parameters into the groups of a torch optimizer.

    Args:
        task: the module that holds the parameters.
        chosen: the parameters by name.
        lr: the base rate.
        weight_decay: the weight decay of the parameters that decay.
        no_decay: which parameters do not: "auto" (biases and norms), or regular expressions.
        groups: settings by name; the first group that matches a parameter holds for it.
        layer_decay: the factor of the rate from each layer to the one below; None for no factor.

    Returns:
        The groups, the highest rate first, each with a "name".

    Raises:
        OptionError: a ParamGroup is the first match of no parameter, or the layers are not known.
    """
    undecayed = _undecayed(task, no_decay) if weight_decay else set()
    levels = layer_levels(task) if layer_decay is not None else {}
    top = max(levels.values(), default=0)
    found: dict[Any, dict[str, Any]] = {}
    used: set[int | None] = set()
    for name, parameter in chosen.items():
        number = next((i for i, group in enumerate(groups) if re.search(group.match, name)), None)
        own = ParamGroup("") if number is None else groups[number]
        used.add(number)
        level = levels.get(name, top)
        rate = lr * (layer_decay or 1.0) ** (top - level) if own.lr is None else own.lr
        decay = own.weight_decay
        if decay is None:
            decay = 0.0 if name in undecayed else weight_decay
        key = (number, level if own.lr is None else top, decay)
        if key not in found:
            layer = f"layer_{level}" if levels and own.lr is None else ""
            kind = "decay" if decay else "no_decay"
            found[key] = {
                "params": [],
                "lr": rate,
                "weight_decay": decay,
                "name": _label(own.match, layer, kind if weight_decay else ""),
                **own.options,
            }
        found[key]["params"].append(parameter)
    for number, group in enumerate(groups):
        if number not in used:
            raise OptionError(
                f"ParamGroup(match={group.match!r}) is the first to match no parameter of "
                f"{name_of(task)}: see the names with named_parameters()"
            )
    return sorted(found.values(), key=lambda group: (-group["lr"], group["weight_decay"] == 0))


def _label(match: str, layer: str, decay: str) -> str:
    """Return a group's name for logs, such as "decay", "layer_3/no_decay" or "^head".

    A group that differs in nothing is "all".
    """
    parts = [part for part in (match, layer) if part]
    if decay == "no_decay" or not parts:
        parts.append(decay)
    return "/".join(parts) or "all"


def _undecayed(task: nn.Module, no_decay: str | Sequence[str]) -> set[str]:
    if no_decay == "auto":
        return biases_and_norms(task)
    patterns = [no_decay] if isinstance(no_decay, str) else no_decay
    names = (name for name, _ in task.named_parameters())
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def biases_and_norms(task: nn.Module) -> set[str]:
    """Return the names of parameters of less than two dimensions, and of those of norm layers.

    Raises:
        TaskError: a parameter is lazy, so that its shape is not known.
    """
    for name, parameter in task.named_parameters():
        if is_lazy(parameter):
            raise TaskError(
                f"{name_of(task)}.{name} has no shape before the first batch, and which parameters "
                "decay follows from the shapes: call the model on an example in configure_model(), "
                "or pass no_decay=() or a pattern, or return a torch optimizer"
            )
    found = {name for name, parameter in task.named_parameters() if dimensions(parameter) < 2}
    for prefix, module in task.named_modules():
        if isinstance(module, _NORMS) or "norm" in type(module).__name__.lower():
            found |= {
                f"{prefix}.{name}" if prefix else name
                for name, _ in module.named_parameters(recurse=False)
            }
    return found


def select(task: nn.Module, chosen: Any, what: str) -> dict[str, nn.Parameter]:
    """Return the trainable parameters of ``task`` that ``chosen`` picks, by name, in its order.

    Args:
        task: the module that holds the parameters.
        chosen: None for all; a regular expression that is searched for in the names; a module of
            the task; parameters; or a function of the task that returns names.
        what: the optimizer, for messages.

    Raises:
        OptionError: ``chosen`` picks no parameter, or one that the task does not have.
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
    if not found and chosen is None:
        raise OptionError(f"{what} has nothing to train in {name_of(task)}: {_why_nothing(task)}")
    if not found:
        named = type(chosen) if isinstance(chosen, nn.Module) else chosen
        picked = chosen if isinstance(chosen, str) else getattr(named, "__name__", "...")
        raise OptionError(
            f"{what}(params={picked!r}) picks no trainable parameter of {name_of(task)}"
        )
    return found


def _why_nothing(task: nn.Module) -> str:
    if frozen := sum(1 for _ in task.parameters()):
        return (
            f"each of its {frozen} parameters is frozen. Call requires_grad_(True) on the layers "
            "that are to learn"
        )
    return "it has no parameters. Build its layers in __init__ or configure_model"


def check_complete(task: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """Check that the optimizers hold every trainable parameter of ``task``, and no other.

    Raises:
        TaskError: a parameter is in no group, or is not the task's; the error names the first ones.
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
        names = ", ".join(left_out[:8])
        if len(left_out) > 8:
            names += f" and {len(left_out) - 8} more"
        raise TaskError(
            f"{name}.optimizers() leaves {len(left_out)} trainable parameter(s) in no group: "
            f"{names}. Add them to a group, or set requires_grad_(False) on them"
        )
    strangers = held - {id(p) for p in task.parameters()}
    if strangers:
        raise TaskError(
            f"{name}.optimizers() holds {len(strangers)} parameter(s) that are not the task's: "
            "make optimizers from self.parameters(), inside optimizers()"
        )


@contextmanager
def no_gradient_outside(task: nn.Module, optimizers: Sequence[Optimizer]) -> Iterator[None]:
    """Inside, a gradient of a parameter that no optimizer holds raises an error.

    Such a parameter was frozen when the optimizers were made. If something frees it later, it would
    never learn. torch calls the hook that raises only where there is such a gradient, so steps cost
    nothing.

    Raises:
        TaskError: naming the parameter, in the backward pass.
    """
    held = {id(p) for o in optimizers for group in o.param_groups for p in group["params"]}
    handles = []
    for name, parameter in task.named_parameters():
        # A trainable parameter is in a group (`check_complete`), also where DeepSpeed has replaced
        # the groups' parameters by its own.
        if parameter.requires_grad or id(parameter) in held:
            continue
        if not (parameter.is_floating_point() or parameter.is_complex()):
            continue
        # torch takes a hook only of a parameter that needs a gradient, and keeps it.
        parameter.requires_grad_(True)
        refuse = partial(_refuse_gradient, f"{name_of(task)}.{name}", optimizers)
        handles.append(parameter.register_post_accumulate_grad_hook(refuse))  # type: ignore[no-untyped-call]
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refuse_gradient(name: str, optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> None:
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if any(parameter is each for group in groups for each in group["params"]):
        raise TaskError(
            f"{name} came into a parameter group after the optimizers were made: a resume makes the "
            "groups that optimizers() returns, and could not restore this one. Put it into a group "
            f"there, and free it later with the hook Unfreeze({{'2 epochs': {name.split('.', 1)[1]!r}}})"
        )
    raise TaskError(
        f"{name} has a gradient and is in no parameter group, so it would never learn: it was "
        "frozen when the optimizers were made. Leave its requires_grad on in __init__, and free it "
        f"later with the hook Unfreeze({{'2 epochs': {name.split('.', 1)[1]!r}}}); or freeze it in "
        "on_setup; or return a torch optimizer over all of self.parameters()"
    )


def check_pattern(pattern: object, option: str) -> None:
    """Check that ``pattern`` is a regular expression.

    Raises:
        OptionError: it is not; the error gives the reason.
    """
    try:
        re.compile(pattern)  # type: ignore[call-overload]
    except (re.error, TypeError) as error:
        raise OptionError(f"{shown(option, pattern)} is no regular expression: {error}") from error
