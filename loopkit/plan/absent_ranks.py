"""Ranks that are not there: this process is rank 0 of any number of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch._subclasses.fake_tensor import unset_fake_temporarily

from loopkit.distributed.communicator import Communicator
from loopkit.errors import OptionError

# The methods of a Communicator that send numbers and objects, which the step then reads.
_OBJECTS = (
    "all_gather_object", "gather_object", "broadcast_object", "run_on_rank_zero", "run_on_all_ranks",
    "all_reduce_sum",
)  # fmt: skip


@contextmanager
def absent_ranks(devices: int, nodes: int) -> Iterator[None]:
    """Inside, this process is rank 0 of ``devices`` ranks on each of ``nodes`` machines.

    torch's fake process group sends nothing: what the other ranks answer is what this rank says.

    Raises:
        OptionError: this process has joined other ranks already.
    """
    size = devices * nodes
    if dist.is_initialized() and dist.get_world_size() == size == 1:
        yield
        return
    if dist.is_initialized():
        raise OptionError(
            "plan makes a process group of its own, and this process has joined one already: plan "
            "in a process that has trained nothing, as loopkit plan does"
        )
    from torch.distributed._tools import fake_collectives  # noqa: F401  shapes of collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shown = {
        "RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": devices,
        "GROUP_WORLD_SIZE": nodes, "MASTER_PORT": 1, "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in shown}
    os.environ.update({name: str(value) for name, value in shown.items()})
    excepthook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    sys.excepthook = excepthook  # torch's marks each line of an error with a rank
    try:
        yield
    finally:
        dist.destroy_process_group()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def send_real_objects(communicator: Communicator) -> None:
    """Let ``communicator`` send objects in real tensors, also within a step of fake ones."""
    for name in _OBJECTS:
        setattr(communicator, name, _without_fakes(getattr(communicator, name)))


def _without_fakes(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any) -> Any:
        with unset_fake_temporarily():
            return method(*arguments)

    return call
