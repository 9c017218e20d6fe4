"""Ranks: which strategy a Fit takes; starting the processes that it needs, or taking this one's
place among them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from loopkit.distributed.communicator import RankInfo, find_rank_info
from loopkit.distributed.failures import Failure
from loopkit.distributed.heartbeat import Heartbeat
from loopkit.distributed.launcher import command, die_with_parent, launch
from loopkit.errors import OptionError, nearest
from loopkit.options import Options
from loopkit.strategies.base import Strategy
from loopkit.strategies.ddp import DDP
from loopkit.strategies.deepspeed.strategy import DeepSpeed
from loopkit.strategies.device_map import spread
from loopkit.strategies.fsdp import FSDP
from loopkit.strategies.single import SingleDevice
from loopkit.strategies.tensor_parallel import TensorParallel

STRATEGIES: dict[str, Any] = {"ddp": DDP, "fsdp": FSDP, "deepspeed": DeepSpeed}
_NAMES = ("auto", "single", *STRATEGIES)


def start_ranks(options: Options) -> int:
    """See to it that as many processes run this as the options ask for.

    In the first process of a plain ``python train.py`` this starts the others and does not return:
    it ends with their exit code. In each of those, and under torchrun, deepspeed or srun, it takes
    the place that was given.

    Returns:
        How many processes are still to be started: 0, but in a session without a script that they
            could run.

    Raises:
        OptionError: more devices than there are, or other numbers than the launcher's.
        SystemExit: in the process that only started the others.
    """
    place, count = find_rank_info(), _wanted(options)
    if place is None:
        if options.nodes > 1 and _joins(options):
            raise OptionError(
                f"nodes={options.nodes}: start the script on each machine, with "
                f"torchrun --nnodes {options.nodes} (or srun)"
            )
        if count == 1:
            return 0
        words = command()
        if words is None:
            return count
        raise SystemExit(launch(count, words))
    if place.size > 1 and not isinstance(sys.excepthook, Failure):
        die_with_parent()
        Failure(place.rank, Heartbeat(place).diagnose).install()
    if options.devices != "auto" and _joins(options) and options.devices != place.local_size:
        raise OptionError(
            f"devices={options.devices}, and {place.local_size} processes were started on this "
            f"machine: "
            "leave devices out, or start as many"
        )
    return 0


def _joins(options: Options) -> bool:
    if options.device_map is not None:
        return False
    if isinstance(options.strategy, Strategy):
        return options.strategy.multi_process
    return (
        isinstance(options.strategy, TensorParallel)
        or options.strategy in STRATEGIES
        or options.strategy == "auto"
    )


def _wanted(options: Options) -> int:
    """How many processes this machine is to run."""
    if not _joins(options):
        return 1
    cpu = options.accelerator in ("cpu", "mps") or not torch.cuda.is_available()
    there = 1 if cpu else torch.cuda.device_count()
    if options.devices == "auto":
        return there
    if not cpu and options.devices > there:
        raise OptionError(f"devices={options.devices}: this machine has {there} GPUs")
    return options.devices


def build_strategy(options: Options) -> Strategy:
    """The strategy that the options name; "auto" is DDP among several processes, else one device.

    Raises:
        OptionError: there is none of that name, or not that many devices.
    """
    if options.device_map is not None:
        return spread(options)
    name = options.strategy
    if isinstance(name, Strategy):
        return name
    if isinstance(name, TensorParallel):
        return FSDP(options.accelerator, tensor=name)
    if name not in _NAMES:
        hint = nearest(str(name), _NAMES)
        raise OptionError(
            f"strategy={name!r} is not known: give one of {', '.join(map(repr, _NAMES))} or a "
            f"Strategy "
            f"object.{hint}"
        )
    if name == "auto":
        place: RankInfo | None = find_rank_info()
        name = "ddp" if place is not None and place.size > 1 else "single"
    if name == "single":
        if options.devices not in ("auto", 1) or options.nodes != 1:
            raise OptionError(
                f"devices={options.devices!r}, nodes={options.nodes}: strategy 'single' uses one "
                f"device"
            )
        return SingleDevice(options.accelerator)
    strategy: Strategy = STRATEGIES[name](accelerator=options.accelerator)
    return strategy
