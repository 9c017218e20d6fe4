"""Whether all ranks were started with the same versions, code, arguments, options and data."""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import re
import shutil
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

from loopkit.checkpoint import NodeDisks, checkpoints_dir
from loopkit.data.micro_batches import MicroBatchLoader
from loopkit.distributed.communicator import Communicator
from loopkit.errors import OptionError, RunDirError
from loopkit.run import Run
from loopkit.strategies.base import Strategy
from loopkit.task import Task, name_of
from loopkit.version import __version__

# Rank 0 alone uses these, or they say where a rank is.
_OPTIONS_OF_A_RANK = {"devices", "nodes", "hooks", "loggers", "progress", "run_dir", "accelerator"}
_ARGUMENTS_OF_A_RANK = {"rank", "local_rank", "global_rank", "device", "device_id", "node", "host"}
_SHOWN = 4
_DISK_DELAY = 5.0  # seconds

# What a rank was started with: a name as messages have it, and a text that is the same on all ranks.
Facts = dict[str, str]


def check_start(run: Run, what: str) -> None:
    """Compare what each rank has before it sends a weight; collective.

    Args:
        run: the run, whose strategy has joined the ranks.
        what: "train" or "evaluate and predict".

    Raises:
        OptionError: names what differs, with the values and the ranks.
    """
    task, strategy, world = run.task, run.strategy, run.strategy.world
    if world.size == 1:
        return
    facts = {
        "loopkit's version": __version__,
        "torch's version": torch.__version__,
        "Python's version": ".".join(platform.python_version_tuple()[:2]),
        "the call": what,
        "the task": name_of(task),
        "the strategy": f"{strategy.name}{_settings(strategy)}",
    }
    facts |= {
        f"the option {option.name}": _text(getattr(run.options, option.name))
        for option in fields(run.options)
        if option.name not in _OPTIONS_OF_A_RANK and option.name != "strategy"
    }
    facts |= _sources(task)
    facts |= {
        f"the shape of {name}": str(list(tensor.shape))
        for name, tensor in [*task.named_parameters(), *task.named_buffers()]
    }
    _compare(world, facts)


def check_training(run: Run) -> None:
    """Compare what the ranks are about to train with; collective.

    Raises:
        OptionError: names what differs, with the values and the ranks.
    """
    loader, world = run.train_loader, run.strategy.world
    if world.size == 1:
        return
    uneven = loader.source.uneven
    facts = {
        f"the argument {name} of {name_of(run.task)}": _text(value)
        for name, value in run.task.hparams.items()
        if name not in _ARGUMENTS_OF_A_RANK and not (uneven and _may_name_data(value))
    }
    for name, optimizer in run.optimizers.items():
        facts[f"the optimizer {name}"] = type(optimizer).__name__
        for number, group in enumerate(optimizer.param_groups):
            facts |= {
                f"{key} of the optimizer {name}, group {number}": _text(value)
                for key, value in group.items()
                if key != "params"
            }
    if not uneven:
        facts["the length of the training data"] = _length(loader)
    facts |= {
        f"the length of the evaluation data{f' {name}' if name else ''}": str(source.end())
        for name, source in run.eval_data.items()
        if hasattr(source, "end")
    }
    _compare(world, facts)


def check_run_dir(run: Run, run_dir: Path) -> None:
    """Check that all ranks see the directory of the run that rank 0 sees; collective.

    Raises:
        RunDirError: a rank sees another one, or none. It says if that holds checkpoints.
    """
    world = run.strategy.world
    if world.size == 1 or (run.options.saves() is None and run.options.resume is None):
        return
    name, shown = world.broadcast_object((f".ranks-{uuid.uuid4().hex}", str(run_dir.absolute())))
    sign = run_dir / name
    world.run_on_rank_zero(sign.touch)
    here = _appears(sign)
    own = sorted(path.name for path in checkpoints_dir(run_dir).glob("step-*")) if not here else []
    answers = world.all_gather_object((here, own[-1] if own else ""))
    world.run_on_rank_zero(lambda: sign.unlink(missing_ok=True))
    without = [rank for rank, (seen, _) in enumerate(answers) if not seen]
    if not without:
        return
    holds = [
        f"rank {rank} holds {newest} there" for rank, (_, newest) in enumerate(answers) if newest
    ]
    raise RunDirError(
        f"{'rank' if len(without) == 1 else 'ranks'} {', '.join(map(str, without))} cannot see the "
        f"run directory of rank 0, {shown}{''.join(f'; {each}' for each in holds)}: all "
        "ranks must see one run directory. Give run_dir= an absolute path on a disk that all "
        "machines share, or checkpoint=False"
    )


def check_node_dirs(disks: NodeDisks, run_dir: Path) -> None:
    """Check that each machine sees a directory of its own at ``run_dir``; collective.

    Raises:
        RunDirError: two machines see one directory, or a rank does not see that of its machine.
    """
    world = disks.communicator
    where = run_dir.parent / f".{run_dir.name}-{world.broadcast_object(uuid.uuid4().hex)}"
    disks.on_each(lambda: where.mkdir(parents=True, exist_ok=True))
    disks.on_each(lambda: (where / str(world.rank)).touch())
    seen = sorted(int(path.name) for path in where.glob("*"))
    everyone = world.all_gather_object(seen)
    disks.on_each(lambda: shutil.rmtree(where, ignore_errors=True))
    for rank, signs in enumerate(everyone):
        if len(signs) > 1:
            raise RunDirError(
                f"Checkpoint(save_on_each_node=True), and the machines of ranks "
                f"{', '.join(map(str, signs))} share {run_dir.absolute()}: leave save_on_each_node "
                "out, or give a run_dir= on a disk of each machine"
            )
        if not signs:
            raise RunDirError(
                f"rank {rank} does not see {run_dir} of its machine: give run_dir= an absolute path"
            )


def _appears(path: Path) -> bool:
    """Return whether ``path`` is there, at the latest after a few seconds: network disks take time."""
    limit = time.monotonic() + _DISK_DELAY
    while not path.exists():
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def _compare(world: Communicator, facts: Facts) -> None:
    """Exchange a digest of the facts, and the facts themselves only if the digests differ."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(world.all_gather_object(digest))) == 1:
        return
    everyone = world.all_gather_object(facts)
    names = list(dict.fromkeys(name for each in everyone for name in each))
    differing = [name for name in names if len({each.get(name) for each in everyone}) > 1]
    shown = "; ".join(
        _difference(name, [each.get(name) for each in everyone]) for name in differing[:_SHOWN]
    )
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    raise OptionError(
        f"the ranks were started differently: {shown}{more}. Start all of them with the same "
        "code, arguments and packages"
    )


def _difference(name: str, values: list[str | None]) -> str:
    """Return which ranks have which value: "lr is 0.1 on rank 0 and 0.01 on ranks 1, 2"."""
    ranks: dict[str | None, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    parts = [
        f"{'missing' if value is None else value[:80]} on "
        f"{'rank' if len(of_one) == 1 else 'ranks'} {', '.join(map(str, of_one))}"
        for value, of_one in ranks.items()
    ]
    return f"{name} is {' and '.join(parts)}"


def _sources(task: Task) -> Facts:
    """Return a digest of each file that defines the task or a module in it, where there is a file."""
    files: dict[str, str] = {}
    for kind in {kind for module in task.modules() for kind in type(module).__mro__}:
        if kind.__module__.split(".")[0] in ("torch", "builtins", "loopkit"):
            continue
        source = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if source is None or kind.__module__ in files:
            continue
        try:
            with open(source, "rb") as file:
                files[kind.__module__] = hashlib.sha256(file.read()).hexdigest()[:12]
        except OSError:
            continue
    named = {
        "the script" if name == "__main__" else f"the code of {name}": d
        for name, d in files.items()
    }
    return {f"{name} (as a digest)": digest for name, digest in sorted(named.items())}


def _settings(strategy: Strategy) -> str:
    """Return the plain settings that a strategy was made with."""
    plain = {
        name: value
        for name, value in vars(strategy).items()
        if isinstance(value, (bool, int, float, str, list, tuple, torch.dtype)) and name != "rank"
    }
    return _text(plain)


def _may_name_data(value: Any) -> bool:
    """Return whether an argument may say which data a rank has, under ``Loader(sharded=True)``."""
    return not isinstance(value, (bool, float, type(None)))


def _length(loader: MicroBatchLoader) -> str:
    steps = loader.steps_per_epoch()
    return "unknown" if steps is None else f"{steps} steps, {loader.source.end()} samples"


def _text(value: Any) -> str:
    """Return a text that equal values have on all ranks: without addresses, devices' numbers or order."""
    if isinstance(value, torch.Tensor):
        if value.numel() == 1 and not value.is_meta:
            return repr(value.item())
        return f"Tensor{tuple(value.shape)}"
    if is_dataclass(value) and not isinstance(value, type):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
        return f"{type(value).__name__}{_text(inner)}"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key}={_text(part)}' for key, part in value.items())})"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(_text, value)))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if inspect.isroutine(value) or isinstance(value, type):
        return str(getattr(value, "__qualname__", type(value).__name__))
    if isinstance(value, (str, int, float, complex, bool, type(None), torch.dtype)):
        return (
            re.sub(r"^(cuda|xpu|mps|cpu):\d+$", r"\1", value)
            if isinstance(value, str)
            else repr(value)
        )
    if isinstance(value, torch.device):
        return value.type
    return type(value).__name__
