"""Optimizers' state by the names of parameters, so that neither order nor strategy matters when it
is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.checkpoint import ShardedTensor
from loopkit.errors import CheckpointError
from loopkit.strategies import dtensor

HOW = (
    "foreach",
    "fused",
    "capturable",
)  # how an optimizer computes: a matter of where it runs, not of its state


def optimizer_state(
    optimizers: Mapping[str, Optimizer], task: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Optimizers' tensors by "<parameter>/<state>" and the rest as plain values.

    With several optimizers the first part is preceded by the optimizer's name.
    """
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, optimizer in optimizers.items():
        prefix = f"{name}/" if len(optimizers) > 1 else ""
        values: dict[str, Any] = {}
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                full = f"{names[id(parameter)]}/{key}"
                if isinstance(value, Tensor):
                    tensors[prefix + full] = value
                else:
                    values[full] = value
        held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        plain[name] = about(optimizer, held, values)
    return tensors, plain


def about(optimizer: Optimizer, held: list[list[str]], values: dict[str, Any]) -> dict[str, Any]:
    """What is saved of an optimizer besides tensors: its class, its groups with the names they
    hold, and values.
    """
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"params": names}
        for group, names in zip(optimizer.param_groups, held)
    ]
    return {"class": type(optimizer).__name__, "groups": groups, "values": values}


def loading(
    optimizers: Mapping[str, Optimizer],
    task: nn.Module,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
    path: Path,
) -> Callable[[], None]:
    """What loads a saved state, once all optimizers have been found to fit it.

    Raises:
        CheckpointError: they are not those that were saved.
    """
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    inputs = []
    for name, optimizer in optimizers.items():
        held = [p for group in optimizer.param_groups for p in group["params"]]
        groups = match_groups(
            name,
            optimizer,
            [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups],
            plain,
            path,
        )
        numbers = {names[id(p)]: number for number, p in enumerate(held)}
        state: dict[int, dict[str, Any]] = {}
        prefix = f"{name}/" if len(optimizers) > 1 else ""
        for parameter, key, value in saved_states(prefix, tensors, plain[name]["values"]):
            if parameter in numbers:
                number = numbers[parameter]
                own = (
                    dtensor.like(value, held[number])
                    if isinstance(value, (Tensor, ShardedTensor))
                    else value
                )
                state.setdefault(number, {})[key] = own
        count = 0
        for group, present in zip(groups, optimizer.param_groups):
            group.update({key: present[key] for key in HOW if key in present})
            count += len(group["params"])
            group["params"] = list(range(count - len(group["params"]), count))
        inputs.append((optimizer, {"state": state, "param_groups": groups}))

    def load() -> None:
        for optimizer, saved in inputs:
            optimizer.load_state_dict(saved)

    return load


def match_groups(
    name: str, optimizer: Optimizer, held: list[list[str]], plain: Mapping[str, Any], path: Path
) -> list[dict[str, Any]]:
    """The saved groups in the order of ``optimizer``'s, found by the names of the parameters that
    each holds.

    Raises:
        CheckpointError: there are no such ones, or they are another optimizer's.
    """
    saved = plain.get(name)
    if saved is None:
        raise CheckpointError(f"{path} has no optimizer {name!r}: it has {', '.join(plain)}")
    if saved["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"{path} was saved with {saved['class']} as optimizer {name!r}, and the task now makes "
            f"{type(optimizer).__name__}"
        )
    by_names = {frozenset(group["params"]): group for group in saved["groups"]}
    groups = []
    for own in held:
        match = by_names.get(frozenset(own))
        if match is None:
            raise CheckpointError(
                f"{path}: optimizer {name!r} has other parameter groups: none of the saved ones "
                f"holds just {', '.join(own[:4])}{' …' if len(own) > 4 else ''}"
            )
        groups.append(match | {"params": own})
    return groups


def saved_states(
    prefix: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> list[tuple[str, str, Any]]:
    """Parameter, key and value of everything saved under ``prefix``, tensors and plain values
    alike.
    """
    found = [
        (full[len(prefix) :], value) for full, value in tensors.items() if full.startswith(prefix)
    ]
    split = [(full.rpartition("/"), value) for full, value in [*found, *values.items()]]
    return [(parameter, key, value) for (parameter, _, key), value in split]
