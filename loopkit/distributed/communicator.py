"""World: the processes that train together, and the few things they say to each other off the hot
path.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from loopkit.errors import LoopkitError, OptionError

T = TypeVar("T")


@dataclass(frozen=True)
class RankInfo:
    """A process's place among those that were started together.

    Attributes:
        rank, size: this process's number, and how many there are.
        local_rank, local_size: the same on this machine.
        host, port: where they meet.
        attempt: how often they were started again; keys of an earlier attempt are not read.
        hosted: whether a launcher holds the store that they meet at; otherwise the first of them
            does.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    attempt: str = "0"
    hosted: bool = False


def find_rank_info(env: Mapping[str, str] = os.environ) -> RankInfo | None:
    """The place that loopkit's launcher, torchrun, deepspeed or SLURM's srun gave this process;
    None without one.

    Raises:
        OptionError: the environment names a rank and leaves out what goes with it.
    """
    if "RANK" in env and "WORLD_SIZE" in env:
        try:
            rank, size = int(env["RANK"]), int(env["WORLD_SIZE"])
            return RankInfo(
                rank,
                size,
                int(env.get("LOCAL_RANK", rank)),
                int(env.get("LOCAL_WORLD_SIZE", size)),
                env.get("MASTER_ADDR", "127.0.0.1"),
                int(env["MASTER_PORT"]),
                env.get("LOOPKIT_ATTEMPT", env.get("TORCHELASTIC_RESTART_COUNT", "0")),
                "LOOPKIT_PARENT" in env or env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            )
        except (KeyError, ValueError) as error:
            raise OptionError(
                f"the environment has RANK={env['RANK']} and no usable {error}: start the script "
                f"with "
                "torchrun, or without any of RANK, WORLD_SIZE and MASTER_PORT"
            ) from None
    if (
        "SLURM_STEP_ID" in env
        and int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1"))) > 1
    ):
        size = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "127.0.0.1"))
        port = 15000 + int(env.get("SLURM_JOB_ID", "0")) % 20000
        local_size = int(re.split(r"[(,]", env.get("SLURM_STEP_TASKS_PER_NODE", str(size)))[0])
        return RankInfo(
            int(env["SLURM_PROCID"]),
            size,
            int(env["SLURM_LOCALID"]),
            local_size,
            env.get("MASTER_ADDR", first_host(nodes)),
            int(env.get("MASTER_PORT", port)),
            env.get("SLURM_RESTART_COUNT", "0"),
        )
    return None


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: "n[03-07,9],m1" has n03."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return (found[1] + (found[2] or "")) if found else nodes


class Communicator:
    """Those who train together. Alone by default: then every method does what one process would.

    All methods but the attributes are collective: every rank calls them, in the same order, from
    its main thread. They go over the CPU (gloo) and never touch the device.

    Attributes:
        rank, size: this one's number, and how many there are.
        counts: whether what this process has is added up; not where another one has the same.
    """

    rank = 0
    size = 1
    is_group_leader = True

    def all_gather_object(self, value: T) -> list[T]:
        """Everyone's ``value``, in the order of ranks."""
        return [value]

    def gather_object(self, value: T) -> list[T]:
        """Everyone's ``value``, in the order of ranks, on the first rank; nothing on the others."""
        return [value]

    def broadcast_object(self, value: T) -> T:
        """The first rank's ``value``."""
        return value

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or raises, on the first rank, which alone calls it."""
        return function()

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, called on all; whichever raises, all do."""
        return function()

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sums of everyone's numbers; whole numbers up to 2**53 are exact."""
        return list(numbers)

    def new_group(self) -> Communicator:
        """The same ranks, to be talked to from another thread, until it is left."""
        return self

    def destroy(self) -> None:
        """Give back what ``beside`` took; the run's own World stays."""

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of everyone's scalar tensor, on its device, without waiting for it."""
        return tensor


class Group(Communicator):
    """A World over a process group of torch.distributed, the default one unless another is given."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def all_gather_object(self, value: T) -> list[T]:
        """Everyone's ``value``, in the order of ranks."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def gather_object(self, value: T) -> list[T]:
        """Everyone's ``value``, in the order of ranks, on the first rank; nothing on the others."""
        everyone: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, everyone, dst=0, group=self._group)
        return everyone or []

    def broadcast_object(self, value: T) -> T:
        """The first rank's ``value``."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or raises, on the first rank, which alone calls it."""
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (function(), None)
            except (
                LoopkitError,
                OSError,
            ) as error:  # what everyone is to hear of; others are this rank's own
                outcome = (None, error)
        result, failure = self.broadcast_object(outcome)
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, called on all; whichever raises, all do."""
        result: Any = None
        failure: BaseException | None = None
        try:
            result = function()
        except (LoopkitError, OSError) as error:
            failure = error
        gathered = self.all_gather_object((result, failure))
        for _, met in gathered:
            if met is not None:
                raise met
        first: T = gathered[0][0]
        return first

    def new_group(self) -> Communicator:
        """The same ranks, to be talked to from another thread, until it is left."""
        return Group(dist.new_group(backend="gloo"))

    def destroy(self) -> None:
        """Give back what ``beside`` took; the run's own World stays."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sums of everyone's numbers; whole numbers up to 2**53 are exact."""
        word = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(word, group=self._group)
        sums: list[float] = word.tolist()
        return sums

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of everyone's scalar tensor, on its device, without waiting for it."""
        total = tensor.detach().clone().reshape(1)
        dist.all_reduce(total, group=self._group)
        return total.reshape(())


def join(place: RankInfo | None, device: torch.device, timeout: float) -> Communicator:
    """Join the others; a process that has joined already stays.

    Args:
        place: this process's place; None for a group of one.
        device: a CUDA device's tensors go over NCCL, all others over gloo.
        timeout: seconds that a rank waits for the others before it gives up.
    """
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(seconds=timeout)
        rank, size = (place.rank, place.size) if place else (0, 1)
        store: Any = HashStore()
        if place is not None:
            waits = not place.hosted
            store = TCPStore(
                place.host,
                place.port,
                size if waits else None,
                waits and rank == 0,
                timeout=limit,
                wait_for_workers=False,
            )
            # A store that outlives an attempt still holds the addresses of its dead processes.
            store = PrefixStore(f"loopkit/{place.attempt}", store)
        given: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
        hook = sys.excepthook
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=limit, **given
        )
        # torch puts one around it, that only marks lines with the rank, and hides what it is
        sys.excepthook = hook
        atexit.register(
            _part
        )  # later Fits of this process go on with it; left to the end, its threads abort
    return Group()


def _part() -> None:
    # what still holds the group must go before the interpreter does, or its threads abort the
    # process
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
