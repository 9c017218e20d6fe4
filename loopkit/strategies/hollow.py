"""Hollow tasks: without memory until they are sharded, then filled from the first rank, a tensor at
a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loopkit.strategies.dtensor import put


def is_on_meta(task: nn.Module) -> bool:
    """Whether any parameter or buffer has no memory."""
    return any(tensor.is_meta for tensor in named(task).values())


def named(task: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; tied ones once."""
    return {**dict(task.named_parameters()), **dict(task.named_buffers())}


def take_out(task: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The values of ``task`` by name, in ``dtype`` if they are floating; afterwards it is hollow,
    tied as before.
    """
    values = {name: tensor.detach() for name, tensor in named(task).items()}
    if dtype is not None:
        values = {name: t.to(dtype) if t.is_floating_point() else t for name, t in values.items()}
    hollow: dict[int, Any] = {}
    for module in task.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                kind = (
                    dtype
                    if dtype is not None and parameter.is_floating_point()
                    else parameter.dtype
                )
                empty = torch.empty_like(parameter, dtype=kind, device="meta")
                fresh = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = hollow.setdefault(id(parameter), fresh)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = dtype if dtype is not None and buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = hollow.setdefault(
                    id(buffer), torch.empty_like(buffer, dtype=kind, device="meta")
                )
    return values


def fill(
    task: nn.Module, full: Mapping[str, Tensor], device: torch.device, home: torch.device
) -> None:
    """Give the hollow shards of ``task`` the first rank's values; called on all ranks.

    Args:
        full: whole values by name, on the first rank; nothing on the others.
        device: what values are sent over.
        home: where the shards are to stay.
    """
    task.to_empty(device=home)
    for name, target in named(task).items():
        empty = torch.empty(tuple(target.shape), dtype=target.dtype, device=device)
        value = full[name].to(device) if full else empty
        dist.broadcast(value, src=0)
        put(target.data, value)
