"""Modules on the meta device: without memory until they are sharded, then filled from rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loopkit.dtypes import stored_dtype
from loopkit.strategies.dtensor import copy_into


def is_on_meta(module: nn.Module) -> bool:
    """Return whether any parameter or buffer is on the meta device."""
    return any(tensor.is_meta for tensor in named_tensors(module).values())


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by name; shared ones appear once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def move_to_meta(module: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Move ``module`` to the meta device in place and return its values by name.

    Parameters that modules share stay shared.

    Args:
        dtype: the dtype of floating tensors, on the meta device and in the result; None keeps
            theirs.
    """

    def dtype_of(tensor: Tensor) -> torch.dtype:
        return stored_dtype(tensor.dtype, dtype)

    values = {name: t.detach().to(dtype_of(t)) for name, t in named_tensors(module).items()}
    on_meta: dict[int, Any] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                empty = torch.empty_like(parameter, dtype=dtype_of(parameter), device="meta")
                fresh = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                part._parameters[name] = on_meta.setdefault(id(parameter), fresh)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                empty = torch.empty_like(buffer, dtype=dtype_of(buffer), device="meta")
                part._buffers[name] = on_meta.setdefault(id(buffer), empty)
    return values


def fill_from_rank_zero(
    module: nn.Module, values: Mapping[str, Tensor], device: torch.device, home: torch.device
) -> None:
    """Give the shards of ``module``, which are on the meta device, the values of rank 0.

    Collective. One whole tensor at a time is in memory.

    Args:
        values: whole tensors by name on rank 0; empty on the other ranks.
        device: the device that values are sent over.
        home: the device where the shards stay.
    """
    module.to_empty(device=home)
    for name, target in named_tensors(module).items():
        empty = torch.empty(tuple(target.shape), dtype=target.dtype, device=device)
        value = values[name].to(device) if values else empty
        dist.broadcast(value, src=0)
        copy_into(target.data, value)
