"""The state of optimizers by parameter name, so that it loads in any order and any strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.checkpoint import ShardedTensor
from loopkit.checkpoint.schema import check_like
from loopkit.errors import CheckpointError
from loopkit.strategies import dtensor

# Which of torch's implementations computes the update. It follows from the device, not the state.
_IMPLEMENTATION_KEYS = ("foreach", "fused", "capturable")


def optimizer_state(
    optimizers: Mapping[str, Optimizer], task: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what ``Strategy.optimizer_state`` returns for optimizers over the task's parameters."""
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
                    # The momentum of sparse gradients. torch continues with it dense in the same way.
                    tensors[prefix + full] = value.to_dense() if value.is_sparse else value
                else:
                    values[full] = value
        group_names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        plain[name] = describe(optimizer, group_names, values)
    return tensors, plain


def describe(
    optimizer: Optimizer, group_names: list[list[str]], values: dict[str, Any]
) -> dict[str, Any]:
    """Return what a checkpoint keeps of an optimizer besides tensors: class, groups and values.

    Args:
        group_names: the names of the parameters in each group.
        values: the plain values of the state by "<parameter>/<key>".
    """
    groups = [
        {key: value for key, value in group.items() if key != "params"} | {"params": names}
        for group, names in zip(optimizer.param_groups, group_names)
    ]
    return {"class": type(optimizer).__name__, "groups": groups, "values": values}


def prepare_load(
    optimizers: Mapping[str, Optimizer],
    task: nn.Module,
    *,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
    path: Path,
) -> Callable[[], None]:
    """Compare a saved state with all optimizers; see ``Strategy.load_optimizer_state``."""
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    states = []
    for name, optimizer in optimizers.items():
        prefix = f"{name}/" if len(optimizers) > 1 else ""
        state = _state_dict(name, optimizer, names, prefix, tensors=tensors, plain=plain, path=path)
        states.append((optimizer, state))

    def load() -> None:
        for optimizer, state in states:
            optimizer.load_state_dict(state)

    return load


def _state_dict(
    name: str,
    optimizer: Optimizer,
    names: Mapping[int, str],
    prefix: str,
    *,
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
    path: Path,
) -> dict[str, Any]:
    """Return a saved state as the argument of torch's ``load_state_dict``.

    Args:
        names: the names of the task's parameters by their ``id``.
        prefix: the start of the names of this optimizer's tensors.
    """
    group_names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    groups = match_groups(name, optimizer, group_names, plain=plain, path=path)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # torch numbers parameters through all groups.
    numbers = {names[id(p)]: number for number, p in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for parameter, key, value in saved_states(prefix, tensors, plain[name]["values"]):
        if parameter in numbers:
            number = numbers[parameter]
            if isinstance(value, (Tensor, ShardedTensor)):
                value = dtensor.shard_like(value, parameters[number])
            state.setdefault(number, {})[key] = value
    start = 0
    for group, present in zip(groups, optimizer.param_groups):
        group.update({key: present[key] for key in _IMPLEMENTATION_KEYS if key in present})
        end = start + len(group["params"])
        group["params"] = list(range(start, end))
        start = end
    return {"state": state, "param_groups": groups}


def match_groups(
    name: str,
    optimizer: Optimizer,
    group_names: list[list[str]],
    *,
    plain: Mapping[str, Any],
    path: Path,
) -> list[dict[str, Any]]:
    """Return the saved parameter groups in the order of the optimizer's, matched by their names.

    Args:
        name: the optimizer's name.
        group_names: the names of the parameters in each of the optimizer's groups.

    Raises:
        CheckpointError: the checkpoint has no such optimizer, another class of optimizer, or other
            groups.
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
    for names, present in zip(group_names, optimizer.param_groups):
        match = by_names.get(frozenset(names))
        if match is None:
            raise CheckpointError(
                f"{path}: optimizer {name!r} has other parameter groups: none of the saved ones "
                f"holds just {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
            )
        for key in match.keys() & present.keys() - {"params"}:
            # Of an optimizer's flags only torch's two choices of a kernel may be open.
            open_flags = key in ("foreach", "fused")
            check_like(match[key], present[key], f"optimizers.{name}.groups.{key}", open_flags)
        groups.append({**present, **match, "params": names})
    return groups


def saved_states(
    prefix: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> list[tuple[str, str, Any]]:
    """Return (parameter, key, value) for each saved tensor under ``prefix`` and each plain value."""
    cut = len(prefix)
    found = [(full[cut:], tensor) for full, tensor in tensors.items() if full.startswith(prefix)]
    split = [(full.rpartition("/"), value) for full, value in [*found, *values.items()]]
    return [(parameter, key, value) for (parameter, _, key), value in split]
