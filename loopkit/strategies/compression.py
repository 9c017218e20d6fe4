"""Compressed gradients for DDP: communication hooks by name."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

COMPRESSIONS = ("fp16", "bf16", "powersgd")


def compress(wrapped: DistributedDataParallel, how: str | Callable[..., Any]) -> None:
    """Register the communication hook called ``how``, or the one given."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if callable(how):
        wrapped.register_comm_hook(None, how)
    elif how == "fp16":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif how == "bf16":
        wrapped.register_comm_hook(None, bf16_hook)
    else:
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=2, start_powerSGD_iter=10
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


# Without `from __future__ import annotations`: torch reads this function's annotations as objects.
def bf16_hook(group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """Average a bucket in bfloat16. torch's own hook of this kind asks for NCCL; this one runs over
    gloo too.
    """
    buffer = bucket.buffer()
    # Divided before the sum, so that it cannot overflow where the gradients did not.
    halves = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    work: Any = dist.all_reduce(halves, async_op=True)
    future: torch.futures.Future[torch.Tensor] = work.get_future().then(
        lambda done: buffer.copy_(done.value()[0])
    )
    return future
