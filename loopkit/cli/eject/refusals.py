"""What ``loopkit eject`` cannot write, by name, with what to do instead."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from loopkit.data.indexed import IndexedSource
from loopkit.data.loader import announce_epoch
from loopkit.errors import OptionError
from loopkit.events import EVENTS, Hook, listens
from loopkit.interop.huggingface import HFTask
from loopkit.optim.lr_schedulers import PlateauSchedule
from loopkit.optim.torch_scheduler import TorchSchedule
from loopkit.options import Checkpoint, Options
from loopkit.run import Run
from loopkit.strategies.base import Strategy
from loopkit.strategies.ddp import DDP
from loopkit.strategies.single import SingleDevice
from loopkit.task import Task, name_of

# Options that change the run, and what a user can do in the script instead.
_OPTIONS = {
    "time": "leave it out, and give --steps: a limit of time is not reproducible",
    "device_map": "leave it out, and move the parts of the model in the script",
    "micro_batch": "leave it out, and give --batch-size and --accumulate, which compute the same",
    "activation_checkpointing": "leave it out, which computes the same, and wrap blocks with "
    "torch.utils.checkpoint in the script",
    "compile": "leave it out, and call torch.compile in the script",
    "debug": "leave it out: the script has no such search",
}
# Hooks that watch a run and change nothing in it: the script leaves them out.
WATCHING = (
    "Curves", "GradMonitor", "LRMonitor", "ModelSummary", "Profiler", "PushToHub", "Throughput",
)  # fmt: skip
# Events of a task that no weight depends on, unless they say so.
_QUIET = (
    "eval_start",
    "eval_step_end",
    "eval_end",
    "eval_interrupted",
    "predict_step_end",
    "log",
    "save",
    "load",
    "error",
)


def refuse(problem: str, advice: str) -> OptionError:
    """Return the error for something that the script cannot hold."""
    return OptionError(f"eject cannot write {problem}: {advice}")


def check_options(options: Options, task: Task) -> None:
    """Refuse options, hooks and loops that the script cannot hold.

    Raises:
        OptionError: naming the option, hook or loop, with what to do.
    """
    defaults = Options()
    for name, advice in _OPTIONS.items():
        if getattr(options, name) not in (getattr(defaults, name), False):
            raise refuse(f"{name}={getattr(options, name)!r}", advice)
    if options.rng == "stream":
        raise refuse(
            "rng='stream'",
            "leave it out: the script's random numbers are functions of the step, as under 'counter'",
        )
    if isinstance(options.checkpoint, Checkpoint) and options.checkpoint.load_best:
        raise refuse(
            "Checkpoint(load_best=True)",
            "leave it out: the script does not evaluate, and ends with the last weights",
        )
    for hook in options.hooks:
        if not _only_watches(hook):
            raise refuse(
                f"the hook {type(hook).__name__}",
                "it takes part in training. Leave it out, and add what it does to the script",
            )
    _check_strategy(options.strategy)
    _check_task(options, task)


def _only_watches(hook: Hook) -> bool:
    kind = type(hook)
    return kind.__module__.startswith("loopkit.") and kind.__name__ in WATCHING


def _check_strategy(strategy: Any) -> None:
    if isinstance(strategy, DDP):
        raise refuse(
            "the arguments of DDP",
            "take strategy='ddp', and give them to DistributedDataParallel in the script",
        )
    if not isinstance(strategy, SingleDevice) and strategy not in ("auto", "single", "ddp"):
        name = strategy if isinstance(strategy, str) else type(strategy).__name__
        raise refuse(f"strategy={name!r}", "take 'ddp' or 'single'")


def _check_task(options: Options, task: Task) -> None:
    for kind in type(task).__mro__[: type(task).__mro__.index(Task)]:
        if kind.__module__.startswith("loopkit.") and kind is not HFTask:
            raise refuse(
                f"{name_of(task)}, which derives from loopkit's {kind.__name__}",
                "derive it from Task, with its own train_step and train_data",
            )
    if options.step is not None:
        raise refuse("Fit(step=)", "return the step from the task's loops()")
    loop = options.epoch or task.loops().get("epoch")
    if loop is not None:
        raise refuse(
            f"{type(loop).__name__}, an epoch of your own",
            "the script has the plain epoch. Eject the task without it, and put what its run() does "
            "in the place of the loop in main()",
        )
    for event in EVENTS:
        inherited = getattr(type(task), f"on_{event}", None) is getattr(HFTask, f"on_{event}", 0)
        if event not in _QUIET and listens(task, event) and not inherited:
            if event != "step_end":
                raise refuse(
                    f"{name_of(task)}.on_{event}",
                    "the script emits no events but step_end. Eject a task without it, and call it in main()",
                )
            if not has_step_end(task):
                raise refuse(
                    f"{name_of(task)}.on_step_end, which uses its arguments",
                    "the script calls it without a run. Keep what it needs in the task",
                )


def has_step_end(task: Task) -> bool:
    """Return whether a task has an ``on_step_end`` that uses the task alone, and not its arguments."""
    if isinstance(task, HFTask) or not listens(task, "step_end"):
        return False
    kind: Any = type(task)
    function = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind.on_step_end))).body[0]
    assert isinstance(function, ast.FunctionDef)
    arguments = {each.arg for each in function.args.args[1:]}
    used = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    return not arguments & used


def check_run(run: Run, described: Any) -> None:
    """Refuse data and optimizers that the script cannot hold.

    Args:
        run: the run, prepared for training.
        described: what ``task.optimizers()`` returned.

    Raises:
        OptionError: naming the method of the task, with what to do.
    """
    name = name_of(run.task)
    source = run.train_loader.source
    if not isinstance(source, IndexedSource):
        raise refuse(
            f"{name}.train_data(), which is read as a stream",
            "return a map-style Dataset or a Loader over one",
        )
    if announce_epoch(source.loader.dataset, 0) and not hasattr(source.loader.dataset, "set_epoch"):
        raise refuse(
            f"set_epoch inside {type(source.loader.dataset).__name__}",
            "give the data set itself set_epoch(epoch)",
        )
    schedule = next(iter(run.schedules.values()), None)
    if any(
        isinstance(s, PlateauSchedule) or getattr(s, "metric", None) for s in run.schedules.values()
    ):
        raise refuse(
            "a schedule that follows a metric", "the script does not evaluate. Take another one"
        )
    if isinstance(schedule, TorchSchedule):
        pair = isinstance(described, tuple) and not isinstance(described[1], Mapping)
        if not pair or schedule.interval != "step" or schedule.frequency != 1:
            raise refuse(
                f"the scheduler of {name}.optimizers()",
                "return the optimizer and a scheduler that follows each step, as a tuple of two",
            )
    if any(parameter.is_complex() for parameter in run.task.parameters()):
        raise refuse(f"{name}, which has complex parameters", "take pairs of real ones")


def left_out(options: Options, run: Run) -> Iterator[str]:
    """Yield what the run does and the script does not, because no weight depends on it."""
    if run.eval_data:
        yield "evaluation"
    if options.loggers:
        yield "loggers"
    yield from (type(hook).__name__ for hook in options.hooks)


def uses_ddp(strategy: str | Strategy | Any, processes: int) -> bool:
    """Return whether the script trains on several ranks."""
    return strategy == "ddp" or (strategy == "auto" and processes > 1)
