"""Which strategy a Fit uses, and the processes that the strategy needs."""

from __future__ import annotations

import logging
import sys
import threading
from functools import cache

import torch

from loopkit import strategies
from loopkit.devices import visible_devices
from loopkit.distributed.environment import (
    ONE_MACHINE,
    RankInfo,
    find_node_info,
    find_rank_info,
    nodes_started,
)
from loopkit.distributed.failures import FailureReporter
from loopkit.distributed.heartbeat import Heartbeat
from loopkit.distributed.launcher import die_with_parent, launch, relaunch_command
from loopkit.errors import OptionError, nearest
from loopkit.options import Options
from loopkit.strategies.base import Strategy
from loopkit.strategies.device_map import DeviceMapStrategy
from loopkit.strategies.single import SingleDevice
from loopkit.strategies.tensor_parallel import TensorParallel

logger = logging.getLogger(__name__)

# The classes of several processes, by the names that users give.
STRATEGIES = {"ddp": "DDP", "fsdp": "FSDP", "deepspeed": "DeepSpeed"}
_NAMES = ("auto", "single", *STRATEGIES)
# For each strategy that device_map excludes: how it uses several devices instead.
_WITHOUT_DEVICE_MAP = {
    "ddp": "copies the whole model to one device in each of several processes",
    "fsdp": "divides every layer among several processes by itself",
    "deepspeed": "divides the training among several processes by itself",
}


def start_ranks(options: Options) -> int:
    """Start the processes that the options ask for, or take this process's rank among them.

    In the first process of a plain ``python train.py`` this function starts the ranks and does
    not return: the process ends with their exit code. In each rank, and under torchrun, deepspeed
    or srun, it checks the options against the number of ranks.

    Returns:
        How many processes the caller must still start. That is 0, except in a session without a
        script that the processes could run.

    Raises:
        OptionError: the options ask for more devices than the machine has, for another number
            than the launcher has started, or for several machines without a launcher's variables.
        SystemExit: this process only started the ranks, and they have ended.
    """
    rank_info, count = find_rank_info(), processes_wanted(options)
    if rank_info is None:
        node = ONE_MACHINE
        if options.nodes > 1 and _is_multi_process(options):
            node = find_node_info(options.nodes)
        elif nodes_started() > 1 and _is_multi_process(options):
            raise OptionError(
                f"this program was started on {nodes_started()} machines (PET_NNODES): start the script "
                f"with torchrun, or pass nodes={nodes_started()}"
            )
        if count * node.nodes == 1:
            return 0
        command = relaunch_command()
        if command is None and node.nodes > 1:
            raise OptionError(f"nodes={node.nodes} needs a script, and this session has none")
        if command is None:
            return count
        logger.info("starting %d ranks on this machine", count)
        raise SystemExit(launch(count, command, node))
    # What fails in another thread goes to whoever started the thread, as Ray does, and not to the hook.
    is_main = threading.current_thread() is threading.main_thread()
    if rank_info.size > 1 and is_main and not isinstance(sys.excepthook, FailureReporter):
        die_with_parent()
        _reporter(rank_info).install()
    started = rank_info.local_size
    if options.devices not in ("auto", started) and _is_multi_process(options):
        raise OptionError(
            f"devices={options.devices}, and {started} processes were started on this machine: "
            "leave devices out, or start as many"
        )
    nodes = rank_info.nodes
    if options.nodes > 1 and nodes not in (None, options.nodes) and _is_multi_process(options):
        raise OptionError(
            f"nodes={options.nodes}, and processes were started on {nodes} "
            f"machine{'s' if nodes != 1 else ''}: leave nodes out, or start as many"
        )
    return 0


@cache
def _reporter(rank_info: RankInfo) -> FailureReporter:
    """Return the reporter of this process: one, and one heartbeat, however many Fits it runs."""
    return FailureReporter(rank_info.rank, Heartbeat(rank_info).diagnose)


def _is_multi_process(options: Options) -> bool:
    if options.device_map is not None:
        return False
    if isinstance(options.strategy, Strategy):
        return options.strategy.multi_process
    return (
        isinstance(options.strategy, TensorParallel)
        or options.strategy in STRATEGIES
        or options.strategy == "auto"
    )


def processes_wanted(options: Options) -> int:
    """Return how many processes this machine is to run."""
    if not _is_multi_process(options):
        return 1
    on_cpu = options.accelerator in ("cpu", "mps") or not torch.cuda.is_available()
    available = 1 if on_cpu else torch.cuda.device_count()
    if options.devices == "auto":
        return available
    if not on_cpu and options.devices > available:
        raise OptionError(f"devices={options.devices}: this machine has {available} GPUs")
    return options.devices


def build_strategy(options: Options) -> Strategy:
    """Return the strategy that the options name.

    "auto" is DDP in one of several processes, and SingleDevice in one that runs alone.

    Raises:
        OptionError: no strategy has that name, or the machine has too few devices.
    """
    if options.device_map is not None:
        return build_device_map(options)
    name = options.strategy
    if isinstance(name, Strategy):
        return name
    if isinstance(name, TensorParallel):
        return strategies.FSDP(options.accelerator, tensor=name)
    if name not in _NAMES:
        hint = nearest(str(name), (*_NAMES, "TensorParallel"))
        raise OptionError(
            f"strategy={name!r} is not known: give one of {', '.join(map(repr, _NAMES))}, or a "
            f"Strategy or TensorParallel object.{hint}"
        )
    if name == "auto":
        rank_info = find_rank_info()
        name = "ddp" if rank_info is not None and rank_info.size > 1 else "single"
        logger.debug("strategy='auto' is %r here", name)
    if name == "single":
        if options.devices not in ("auto", 1) or options.nodes != 1:
            raise OptionError(
                f"devices={options.devices!r}, nodes={options.nodes}: strategy 'single' uses one "
                "device"
            )
        return SingleDevice(options.accelerator)
    strategy: Strategy = getattr(strategies, STRATEGIES[name])(accelerator=options.accelerator)
    return strategy


def build_device_map(options: Options) -> DeviceMapStrategy:
    """Return the strategy for the option ``device_map``.

    Raises:
        OptionError: another option contradicts ``device_map``.
    """
    strategy, device_map = options.strategy, options.device_map
    assert device_map is not None
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name.lower() in _WITHOUT_DEVICE_MAP:
        raise OptionError(
            f"device_map and strategy={name!r} exclude each other: device_map spreads one model "
            f"over the devices of one process, and {name} {_WITHOUT_DEVICE_MAP[name.lower()]}. "
            "Leave one out"
        )
    if name not in ("auto", "single"):
        raise OptionError(
            f"device_map chooses the strategy, and strategy={name!r} is given: leave one out"
        )
    if options.nodes != 1:
        raise OptionError(
            f"device_map spreads layers over one machine's devices, and nodes={options.nodes} is "
            "given"
        )
    if device_map != "auto" and options.devices != "auto":
        raise OptionError(
            f"device_map names the devices, and devices={options.devices!r} is given: leave that "
            "out"
        )
    devices = visible_devices(options.accelerator, options.devices)
    found = DeviceMapStrategy(device_map, devices)
    if options.rng == "stream" and len({d for d in found.devices if d.type != "cpu"}) > 1:
        raise OptionError(
            "rng='stream' keeps the random stream of one device, and device_map uses several: "
            "leave rng='counter', the default"
        )
    return found
