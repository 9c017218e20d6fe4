"""Sharded tensors (torch's DTensor): gather them, cut them from whole ones, and save each part once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopkit.checkpoint import Shard, ShardedTensor
from loopkit.errors import OptionError
from loopkit.sharded import is_sharded, local_tensor

# The optimizers whose fused kernels take sharded tensors.
_FUSED = (torch.optim.Adam, torch.optim.AdamW)


def full_tensor(tensor: Any) -> Tensor:
    """Return a sharded tensor whole on every rank (collective); another tensor as it is."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return whole


def local_box(tensor: Any) -> tuple[slice, ...]:
    """Return which part of the whole this rank holds of a sharded tensor."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tuple(slice(start, start + size) for start, size in zip(offset, shape))


def local_shard(tensor: Any) -> Shard:
    """Return what this rank saves of a sharded tensor: its part, unless another rank saves that."""
    mesh, local = tensor.device_mesh, local_tensor(tensor)
    # Of several ranks with the same part, the one at 0 on each axis that replicates saves it. What
    # is not split over tensor-parallel groups is the first group's to save.
    replicas = [
        coordinate
        for coordinate, placement in zip(mesh.get_coordinate(), tensor.placements)
        if placement.is_replicate()
    ]
    if any(replicas) or int(mesh.mesh.min()) or not local.numel():
        return Shard(None, (0,) * tensor.ndim, tuple(tensor.shape))
    offset = tuple(extent.start for extent in local_box(tensor))
    return Shard(local, offset, tuple(tensor.shape))


def local_shards(value: Any) -> Any:
    """Return ``value`` with each sharded tensor in its dicts, lists and tuples as a Shard."""
    if isinstance(value, Tensor):
        return local_shard(value) if is_sharded(value) else value
    if type(value) is dict:
        return {key: local_shards(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(local_shards(item) for item in value)
    return value


def shard_like(tensor: Any, pattern: Any) -> Tensor:
    """Return a whole or saved tensor cut as ``pattern`` is; whole if that is not sharded.

    A tensor of another shape stays whole too, such as a count of steps.
    """
    if not is_sharded(pattern) or is_sharded(tensor) or tensor.shape != pattern.shape:
        return tensor[()] if isinstance(tensor, ShardedTensor) else tensor
    cut = tensor[local_box(pattern)]
    cut = cut.to(pattern.device, copy=isinstance(tensor, Tensor)).contiguous()
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
def copy_into(target: Any, tensor: Tensor | ShardedTensor) -> None:
    """Copy a whole or saved tensor into ``target``, which may be sharded; not collective."""
    if is_sharded(target):
        local_tensor(target).copy_(tensor[local_box(target)])
    else:
        target.copy_(tensor[()])


def copy_all_into(targets: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Copy into each target the tensor of its name; see ``copy_into``."""
    for name, target in targets.items():
        copy_into(target, tensors[name])


def replica_count(tensor: Any, world_size: int) -> int:
    """Return how many of ``world_size`` ranks hold the same part of a sharded tensor."""
    parts = 1
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements):
        parts *= 1 if placement.is_replicate() else size
    return world_size // parts


def sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all elements, a scalar in double precision on ``device``."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(tensors)).to(device).double().square().sum()


def match_placements(parameters: Iterable[Any]) -> None:
    """Redistribute gradients so that each is split as its parameter is; collective.

    A norm on split activations leaves each rank with a summand of the gradient. An embedding that
    is split by its vocabulary leaves each rank with the whole gradient.
    """
    for parameter in parameters:
        if is_sharded(parameter) and parameter.grad.placements != parameter.placements:
            parameter.grad = parameter.grad.redistribute(placements=parameter.placements)


def check_takes_parts(optimizer: Optimizer) -> None:
    """Refuse an optimizer that cannot step a part of a parameter.

    Raises:
        OptionError: it needs whole parameters.
    """
    kind = type(optimizer)
    if kind.__name__ == "Adafactor" or kind.__module__.split(".")[0] == "bitsandbytes":
        raise OptionError(
            f"{kind.__name__} needs each parameter whole, and under FSDP and TensorParallel a rank "
            "holds parts of them: take another optimizer (adamw, lion, muon), or strategy='ddp'"
        )


def leave_kernels(optimizer: Optimizer) -> None:
    """Switch off the kernels of torch that do not take the sharded tensors of ``optimizer``."""
    for group in optimizer.param_groups:
        # Neither kernel takes tensors of several meshes at once.
        if len({getattr(p, "device_mesh", None) for p in group["params"]}) > 1:
            group.update({key: False for key in ("fused", "foreach") if key in group})
        elif group.get("fused") and type(optimizer) not in _FUSED:
            group["fused"] = False
