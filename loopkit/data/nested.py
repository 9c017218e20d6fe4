"""The size of a batch, its tokens, and moving it: batches are any nesting of dicts, lists, tuples
and tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def first_tensor(batch: Any) -> Tensor | None:
    """The first tensor with a leading dimension, depth first; None when the batch holds none."""
    if isinstance(batch, Tensor):
        return batch if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = batch.values()
    elif not isinstance(batch, (list, tuple)):
        return None
    for part in batch:
        found = first_tensor(part)
        if found is not None:
            return found
    return None


def batch_size(batch: Any) -> int:
    """How many samples a batch holds: the leading dimension of its first tensor, else its length,
    else 1.
    """
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    tensor = first if isinstance(first, Tensor) and first.ndim else first_tensor(batch)
    if tensor is not None:
        return tensor.shape[0]
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()), ())
    return len(batch) if isinstance(batch, (list, tuple)) else 1


def token_count(batch: Any) -> int:
    """How many tokens a batch holds: the elements of ``input_ids`` where it has them, else 0."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, Tensor) else 0


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """``batch`` with ``function`` applied to each tensor. Other objects with a ``.to`` are left
    alone.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, part) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(map_tensors(function, part) for part in batch)
    if isinstance(batch, dict):
        return {key: map_tensors(function, part) for key, part in batch.items()}
    if isinstance(
        batch, Mapping
    ):  # transformers' BatchEncoding and its like build themselves from a dict
        return type(batch)({key: map_tensors(function, part) for key, part in batch.items()})  # type: ignore[call-arg]
    return batch


def transfer_fn(device: torch.device, dtype: torch.dtype | None) -> Callable[[Any], Any] | None:
    """What brings a batch to ``device``, its floating tensors to ``dtype``; None when there is
    nothing to do.
    """
    if device.type == "cpu" and dtype is None:
        return None

    def move(tensor: Tensor) -> Tensor:
        target = dtype if dtype is not None and tensor.is_floating_point() else None
        return tensor.to(device, target, non_blocking=True)

    return lambda batch: map_tensors(move, batch)
