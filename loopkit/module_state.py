"""The state of a module, in torch's own terms: parameters, buffers and extra state."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from loopkit.errors import CheckpointError

_KEY = "_extra_state"  # torch's name of it in a state_dict


def is_extra(name: str) -> bool:
    """Return whether a name of a ``state_dict`` is that of a module's extra state."""
    return name.rpartition(".")[2] == _KEY


def tensors_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the parameters and buffers of a ``state_dict``, without extra state."""
    return {name: tensor for name, tensor in state.items() if not is_extra(name)}


def extra_state(module: nn.Module) -> dict[str, Any]:
    """Return what ``get_extra_state`` of each submodule gives, by the name of ``state_dict``."""
    return {name: part.get_extra_state() for name, part in _keepers(module)}


def load_extra_state(module: nn.Module, saved: Mapping[str, Any], where: str | Path) -> None:
    """Give each submodule its extra state of a checkpoint.

    Raises:
        CheckpointError: a submodule that keeps extra state has none in ``where``.
    """
    for name, part in _keepers(module):
        if name not in saved:
            raise CheckpointError(
                f"{where} holds no extra state of {name.removesuffix(_KEY).rstrip('.') or 'the task'}"
                f", a {type(part).__name__}"
            )
        part.set_extra_state(saved[name])


@torch.no_grad()
def make_room(module: nn.Module, saved: Mapping[str, Any], new_buffers: Collection[str]) -> None:
    """Give ``module`` what saved values need a place in: shapes and buffers. Values follow later.

    Lazy parameters get their shapes. Observers of quantisation-aware training, memory banks and
    queues change the shape of their buffers while they train, so a new module starts with other
    shapes than a trained one.

    Args:
        module: the module.
        saved: tensors by name.
        new_buffers: the buffers that steps of the saved run had registered.
    """
    for name in new_buffers:
        owner, leaf = _owner(module, name)
        if name in saved and owner is not None and owner._buffers.get(leaf) is None:
            shape, dtype = tuple(saved[name].shape), saved[name].dtype
            owner.register_buffer(leaf, torch.zeros(shape, dtype=dtype, device=_device(module)))
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in saved and is_lazy(tensor):
            tensor.materialize(tuple(saved[name].shape), dtype=saved[name].dtype)
    for name, buffer in module.named_buffers():
        if name in saved and buffer.shape != saved[name].shape:
            buffer.resize_(tuple(saved[name].shape))


def differences(
    module: nn.Module,
    own: Mapping[str, Any],
    saved: Mapping[str, Any],
    new_buffers: Collection[str],
) -> str:
    """Return how saved tensors differ in names and shapes from a module's own; "" if they fit.

    What ``make_room`` makes to fit is no difference.
    """
    wrong = [f"{name} is missing in the checkpoint" for name in own if name not in saved]
    for name in [name for name in saved if name not in own]:
        owner, leaf = _owner(module, name)
        free = owner is not None and (leaf in owner._buffers or not hasattr(owner, leaf))
        if name not in new_buffers or not free:
            wrong.append(f"{name} is not in the task")
    buffers = {name for name, _ in module.named_buffers()}
    for name in [name for name in own if name in saved and name not in buffers]:
        if is_lazy(own[name]):
            continue
        shape, saved_shape = tuple(own[name].shape), tuple(saved[name].shape)
        if shape != saved_shape:
            wrong.append(f"{name} has shape {saved_shape}, the task's has {shape}")
    more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
    return "; ".join(wrong[:6]) + more


def _owner(module: nn.Module, name: str) -> tuple[nn.Module | None, str]:
    """Return the submodule that a buffer of this name belongs to, if there is one; and its leaf."""
    path, _, leaf = name.rpartition(".")
    return dict(module.named_modules()).get(path), leaf


def _device(module: nn.Module) -> torch.device | None:
    first = next(iter([*module.parameters(), *module.buffers()]), None)
    return None if first is None else first.device


def _keepers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the submodules that define ``get_extra_state``, by the name of ``state_dict``."""
    for prefix, part in module.named_modules():
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield f"{prefix}.{_KEY}" if prefix else _KEY, part
