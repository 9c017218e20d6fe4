"""Sharded tensors (torch's DTensor): gathered whole, cut into the parts that are saved, and cut
from whole ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopkit.checkpoint import Shard, ShardedTensor


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is one of torch's DTensors. Known by what it has: importing the class
    takes half a second.
    """
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def whole(tensor: Any) -> Tensor:
    """A sharded tensor gathered, on every rank (collective); another one itself."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return gathered


def local(tensor: Any) -> Tensor:
    """This rank's part of a sharded tensor, the same memory; another one itself."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def box(tensor: Any) -> tuple[slice, ...]:
    """Where this rank's part of a sharded tensor lies in the whole."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(at, at + size) for at, size in zip(offset, shape))


def part(tensor: Any) -> Shard:
    """What this rank saves of a sharded tensor: its box, unless that is empty or another rank has
    the same.
    """
    mesh, own = tensor.device_mesh, local(tensor)
    elsewhere = [
        at
        for at, placement in zip(mesh.get_coordinate(), tensor.placements)
        if placement.is_replicate()
    ]
    elsewhere.append(
        int(mesh.mesh.min())
    )  # what is not split over teams is the first team's to save
    if any(elsewhere) or not own.numel():
        return Shard(None, (0,) * tensor.ndim, tuple(tensor.shape))
    return Shard(own, tuple(place.start for place in box(tensor)), tuple(tensor.shape))


def parts(value: Any) -> Any:
    """``value`` with every sharded tensor in its dicts, lists and tuples replaced by this rank's
    part of it.
    """
    if isinstance(value, Tensor):
        return part(value) if is_sharded(value) else value
    if type(value) is dict:
        return {key: parts(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(parts(item) for item in value)
    return value


def like(tensor: Any, pattern: Any) -> Tensor:
    """A whole tensor, or pieces of one, cut as ``pattern`` is, where that is sharded and of its
    shape; else whole.
    """
    if not is_sharded(pattern) or is_sharded(tensor) or tensor.shape != pattern.shape:
        return tensor[()] if isinstance(tensor, ShardedTensor) else tensor
    cut = tensor[box(pattern)].to(pattern.device, copy=isinstance(tensor, Tensor)).contiguous()
    made: Tensor = type(pattern.data).from_local(
        cut,
        pattern.device_mesh,
        pattern.placements,
        run_check=False,
        shape=pattern.shape,
        stride=pattern.stride(),
    )
    return made


@torch.no_grad()
def put(target: Any, tensor: Tensor | ShardedTensor) -> None:
    """Copy a whole tensor, or pieces of one, into ``target``, which may be sharded; no collective."""
    if is_sharded(target):
        local(target).copy_(tensor[box(target)])
    else:
        target.copy_(tensor[()])


def put_all(targets: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """``put`` for each name of ``targets``."""
    for name, target in targets.items():
        put(target, tensors[name])


def copies(tensor: Any, ranks: int) -> int:
    """How many of ``ranks`` hold the same part of a sharded tensor."""
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements):
        parts *= 1 if placement.is_replicate() else size
    return ranks // parts


def align(parameters: Iterable[Any]) -> None:
    """Have gradients be split as their parameters are; collective.

    A norm on split activations leaves each rank with a summand, an embedding split by words with
    the whole.
    """
    for parameter in parameters:
        if is_sharded(parameter) and parameter.grad.placements != parameter.placements:
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
