"""The text that makes an optimizer: torch's class over groups of parameters, chosen by conditions."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from loopkit.cli.eject.layout import fold, literal
from loopkit.cli.eject.refusals import refuse
from loopkit.cli.eject.source import Import
from loopkit.optim.specs import OptimizerSpec

_GROUP_ONLY = ("params", "name", "initial_lr")
Chosen = Callable[[str, nn.Parameter], bool]


def optimizer_text(
    task: nn.Module, optimizer: Optimizer, spec: OptimizerSpec, *, scheduled: bool
) -> tuple[str, set[Import]]:
    """Return a function that makes the optimizer, and the imports that it needs.

    Args:
        task: the task, whose parameters the optimizer has.
        optimizer: the optimizer that ``spec`` made.
        scheduled: whether a schedule changes its rates.

    Raises:
        OptionError: the class is loopkit's, or an option of it cannot be written.
    """
    kind = type(optimizer)
    if kind.__module__.startswith("loopkit."):
        raise refuse(f"the optimizer {spec.name}", "take one of torch, such as AdamW")
    foreign = not kind.__module__.startswith("torch.")
    called = kind.__name__ if foreign else f"torch.optim.{kind.__name__}"
    needed = {Import(kind.__module__, kind.__name__, kind.__name__)} if foreign else set()
    options = _options(optimizer, spec)
    shown = [f"{name}={literal(value)}" for name, value in options.items()]
    groups = list(_groups(task, optimizer, spec))
    lines = [
        f"def make_optimizer(model: nn.Module) -> {called}:",
        f'    """Return the optimizer over the groups of parameters{_about(groups)}."""',
    ]
    if len(groups) == 1 and groups[0][0] == "":
        own = [f"{name}={literal(value)}" for name, value in groups[0][1].items()]
        every = "[p for p in model.parameters() if p.requires_grad]"
        made = [every, *own, *(setting for setting in shown if setting not in own)]
        lines.append(f"    {_assign(called, made, scheduled)}")
    else:
        lines.append(
            "    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]"
        )
        lines.append("    groups = [")
        for condition, settings in groups:
            rest = [f'"{name}": {literal(value)}' for name, value in settings.items()]
            chosen = f'"params": [p for n, p in trainable if {condition}]'.replace(" if ]", "]")
            lines.append(f"        {fold(8, '{', [chosen, *rest], '}')},")
        lines.append("    ]")
        lines.append(f"    {_assign(called, ['groups', *shown], scheduled)}")
    if scheduled:
        lines += [
            "    for rates in optimizer.param_groups:",
            '        rates["initial_lr"] = rates["lr"]  # the schedule is a factor of it',
            "    return optimizer",
        ]
    return "\n".join(lines), needed


def _assign(called: str, arguments: Sequence[str], scheduled: bool) -> str:
    head = "optimizer = " if scheduled else "return "
    return fold(4, f"{head}{called}(", arguments, ")")


def _about(groups: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    decays = {group.get("weight_decay") for _, group in groups}
    return "; some do not decay" if len(groups) > 1 and 0.0 in decays else ""


def _options(optimizer: Optimizer, spec: OptimizerSpec) -> dict[str, Any]:
    """Return the arguments of the class, those that are not its defaults."""
    found = {"lr": spec.lr, **spec.options}
    accepted = inspect.signature(type(optimizer).__init__).parameters
    for name in list(found):
        same = name in accepted and accepted[name].default == found[name]
        if found[name] is None or (same and name != "lr"):
            del found[name]
    if optimizer.defaults.get("fused") or optimizer.param_groups[0].get("fused"):
        found["fused"] = True
    for name, value in found.items():
        if not isinstance(value, (int, float, str, bool, tuple)):
            raise refuse(f"{spec.name}({name}={value!r})", "give a plain value")
    return found


def _groups(
    task: nn.Module, optimizer: Optimizer, spec: OptimizerSpec
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield for each group the condition that chooses its parameters, and its settings."""
    named = {n: p for n, p in task.named_parameters() if p.requires_grad}
    name_of = {id(p): n for n, p in named.items()}
    for group in optimizer.param_groups:
        members = [name_of[id(p)] for p in group["params"]]
        settings = {
            name: value
            for name, value in group.items()
            if name not in _GROUP_ONLY
            and (name in ("lr", "weight_decay") or value != optimizer.defaults.get(name))
        }
        yield _condition(named, members, spec), settings


def _condition(named: Mapping[str, nn.Parameter], members: list[str], spec: OptimizerSpec) -> str:
    """Return the shortest condition on n and p that chooses these members, in this order."""
    for text, chosen in _candidates(spec):
        if [n for n, p in named.items() if chosen(n, p)] == members:
            return text
    listed = ", ".join(f'"{name}"' for name in members)
    if [n for n in named if n in set(members)] != members:
        raise refuse("a group of parameters in an order of its own", "take the order of the model")
    return f"n in ({listed},)"


def _candidates(spec: OptimizerSpec) -> Iterator[tuple[str, Chosen]]:
    patterns = [group.match for group in spec.groups]
    patterns += [spec.params] if isinstance(spec.params, str) else []
    if spec.no_decay != "auto":
        patterns += [spec.no_decay] if isinstance(spec.no_decay, str) else list(spec.no_decay)
    names: list[tuple[str, Chosen]] = [("", lambda n, p: True)]
    for pattern in patterns:
        names.append((f"re.search({literal(pattern)}, n)", _matching([pattern])))
    if patterns:
        text = " or ".join(f"re.search({literal(pattern)}, n)" for pattern in patterns)
        other = (
            f"not re.search({literal(patterns[0])}, n)" if len(patterns) == 1 else f"not ({text})"
        )
        any_of = _matching(patterns)
        names.append((other, lambda n, p: not any_of(n, p)))
    sizes: list[tuple[str, Chosen]] = [
        ("", lambda n, p: True),
        ("p.ndim >= 2", lambda n, p: p.ndim >= 2),
        ("p.ndim < 2", lambda n, p: p.ndim < 2),
    ]
    for name, by_name in names:
        for size, by_size in sizes:
            yield " and ".join(filter(None, (name, size))), _both(by_name, by_size)


def _matching(patterns: list[str]) -> Chosen:
    return lambda n, p: any(re.search(pattern, n) for pattern in patterns)


def _both(first: Chosen, second: Chosen) -> Chosen:
    return lambda n, p: first(n, p) and second(n, p)
