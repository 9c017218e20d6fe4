"""Sharded tensors (torch's DTensor): recognise one, and take this rank's part of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Return whether ``tensor`` is a DTensor, without the import of that class, which is slow."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local_tensor(tensor: Any) -> Tensor:
    """Return this rank's part of a sharded tensor, in the same memory; another tensor as it is."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return local


@torch.no_grad()
def local_tensors(tensors: Iterable[Any]) -> list[Tensor]:
    """Return ``local_tensor`` of each, outside of any graph: a node for each costs ten times as much."""
    return [local_tensor(tensor) for tensor in tensors]
