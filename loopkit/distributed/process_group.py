"""The process group of torch.distributed: join it, and start all ranks from the same weights."""

from __future__ import annotations

import atexit
import gc
import logging
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import HashStore, PrefixStore, TCPStore  # type: ignore[attr-defined]

from loopkit.checks import checked_number
from loopkit.devices import find_device
from loopkit.distributed.communicator import Communicator, ProcessGroupCommunicator
from loopkit.distributed.environment import RankInfo, find_rank_info
from loopkit.distributed.launcher import port_is_taken
from loopkit.errors import OptionError

# The meshes of a default process group, which end with it.
_MESHES: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessGroupSetup:
    """How a strategy joins the other ranks.

    Attributes:
        accelerator: "auto", "cpu" or "cuda".
        timeout: seconds that a rank waits in a collective before the run fails as hung.
        always: whether a process that runs alone makes a process group too.

    Raises:
        OptionError: the timeout is not a number above 0.
    """

    accelerator: str
    timeout: float
    always: bool = False

    def __post_init__(self) -> None:
        checked_number(self.timeout, "timeout", above=0, what="seconds")

    @property
    def local_size(self) -> int:
        """The number of ranks on this machine."""
        rank_info = find_rank_info()
        return rank_info.local_size if rank_info else 1

    def init(self) -> tuple[torch.device, Communicator]:
        """Join the other ranks; return this rank's device, and the communicator over all ranks."""
        rank_info = find_rank_info()
        device = find_device(self.accelerator, rank_info.local_rank if rank_info else None)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        runs_alone = rank_info is None or rank_info.size == 1
        if runs_alone and not self.always and not dist.is_initialized():
            return device, Communicator()
        return device, init_process_group(rank_info, device, self.timeout)


def init_process_group(
    rank_info: RankInfo | None, device: torch.device, timeout: float
) -> Communicator:
    """Join the default process group, or use the one that this process has joined already.

    Args:
        rank_info: this process's rank; None makes a group of one.
        device: CUDA tensors go over NCCL, all others over gloo.
        timeout: seconds that a rank waits in a collective before it gives up. A group that is there
            keeps its own.

    Raises:
        OptionError: the group that is there does not send the tensors of both devices.
    """
    if dist.is_initialized():
        check_backends(dist.get_backend_config(), device.type)
        return ProcessGroupCommunicator()
    # A module that takes the default group of its import as the default of its functions' arguments.
    # DDP imports it. Imported here, before there is a group, it does not hold the group beyond its end.
    from torch.distributed.nn import functional  # noqa: F401

    limit = timedelta(seconds=timeout)
    rank, size = (rank_info.rank, rank_info.size) if rank_info else (0, 1)
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    excepthook = sys.excepthook
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=HashStore() if rank_info is None else rank_store(rank_info, limit),
        rank=rank,
        world_size=size,
        timeout=limit,
        **options,
    )
    # torch wraps the hook to mark each line with the rank, which would hide FailureReporter.
    sys.excepthook = excepthook
    # Later Fits of this process use the same group. At exit its threads would abort the process.
    atexit.register(_destroy_process_group)
    logger.debug("rank %d of %d has joined the process group on %s", rank, size, device)
    return ProcessGroupCommunicator()


def check_backends(config: str, device_type: str) -> None:
    """Check that a process group sends the tensors of the CPU and of a kind of device.

    Args:
        config: as ``torch.distributed.get_backend_config`` returns it: "cpu:gloo,cuda:nccl".
        device_type: "cpu" or "cuda".

    Raises:
        OptionError: it does not. Only whoever made the group can change that.
    """
    devices = {part.partition(":")[0] for part in config.split(",")}
    if devices >= {"cpu", device_type}:
        return
    wanted = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    raise OptionError(
        f"the process group that was made before this Fit sends {config}, and loopkit sends tensors of "
        f"the {' and '.join(sorted({'cpu', device_type}))}: make it with backend={wanted!r}. In Ray that "
        f"is TorchTrainer(torch_config=TorchConfig(backend={wanted!r}))"
    )


def check_alone(strategy: str) -> None:
    """Check that a run which trains in one process by itself is not one of several ranks.

    Raises:
        OptionError: the process belongs to a process group of several.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise OptionError(
            f"{strategy} trains in one process, and this one is rank {dist.get_rank()} of "
            f"{dist.get_world_size()} in a process group: each would train alone, on all of the data, and "
            "write the same files. Leave strategy out, or give 'ddp' or 'fsdp'"
        )


def device_mesh(device_type: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Any:
    """Return a DeviceMesh over all ranks; later Fits of this process get the same one.

    A new mesh of several axes would start process groups, with threads and sockets, in each Fit.

    Args:
        device_type: "cpu" or "cuda".
        shape: the number of ranks on each axis.
        axes: the name of each axis.
    """
    from torch.distributed.device_mesh import init_device_mesh

    of_group = _MESHES.setdefault(dist.group.WORLD, {})
    key = device_type, shape, axes
    if key not in of_group:
        of_group[key] = init_device_mesh(device_type, shape, mesh_dim_names=axes)
    return of_group[key]


def rank_store(rank_info: RankInfo, limit: timedelta) -> Any:
    """Return the store where the ranks meet; rank 0 holds it unless the launcher does.

    Args:
        limit: how long to wait for the store, and for a key in it.
    """
    connected = _connected(rank_info)
    if not connected:
        connected.append(_connect(rank_info, limit))
    # A store that outlives an attempt still holds the addresses of its dead processes.
    store = PrefixStore(f"loopkit/{rank_info.attempt}", connected[0])
    store.set_timeout(limit)
    return store


@lru_cache
def _connected(rank_info: RankInfo) -> list[Any]:
    """Return the list that keeps the store of this process: rank 0 can hold only one at a time."""
    return []


def _connect(rank_info: RankInfo, limit: timedelta) -> Any:
    if dist.is_initialized():
        # The script, or Ray, has made the group: its rank 0 holds a store at that address.
        store: Any = dist.distributed_c10d._get_default_store()
        # torch 2.6 and 2.7 cannot clone one, and its time limit then changes too.
        return store.clone() if hasattr(store, "clone") else store
    is_master = not rank_info.hosted and rank_info.rank == 0
    try:
        return TCPStore(
            rank_info.host,
            rank_info.port,
            world_size=None if rank_info.hosted else rank_info.size,
            is_master=is_master,
            timeout=limit,
            wait_for_workers=False,
        )
    except RuntimeError as error:
        if is_master and "EADDRINUSE" in str(error):
            raise OptionError(port_is_taken(rank_info.port)) from error
        raise


def _destroy_process_group() -> None:
    """Destroy the group and what holds it: its threads end with the last that does.

    A thread that outlives the interpreter can abort the process, whose exit code is then not the run's.
    """
    for meshes in _MESHES.values():
        for mesh in meshes.values():
            # torch keeps meshes in caches of how it shards operations. Those of newer versions hold groups.
            getattr(mesh, "_pg_registry", {}).clear()
    _MESHES.clear()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast_module(module: nn.Module, world: Communicator) -> None:
    """Give every rank the parameters and buffers of rank 0; collective."""
    if world.size > 1:
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                dist.broadcast(tensor.detach(), src=0)
