"""A step of the user's own, and several optimizers: what the script needs for them."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import Any

from loopkit.cli.eject.layout import fold, literal
from loopkit.cli.eject.optimizer import optimizer_text
from loopkit.cli.eject.refusals import refuse
from loopkit.cli.eject.schedule import schedule_context
from loopkit.cli.eject.script import render
from loopkit.cli.eject.source import Import, SourceModule
from loopkit.loops import StepLoop
from loopkit.loops.step import read_step
from loopkit.optim.lr_schedulers import RateSchedule
from loopkit.optim.specs import OptimizerSpec
from loopkit.options import Options
from loopkit.run import Run
from loopkit.task import name_of

_OF_RUN = ("task", "optimizers", "log")
_OF_STEP = ("run", "backward", "update")


def needs_loop(run: Run) -> bool:
    """Return whether a run has a step of its own, or several optimizers."""
    return type(run.loops.step) is not StepLoop or len(run.optimizers) > 1


def check_loop(run: Run, options: Options, *, ddp: bool) -> None:
    """Refuse what the script's step cannot do.

    Raises:
        OptionError: naming it.
    """
    own = type(run.loops.step)
    what = f"{own.__name__}, a step of your own," if own is not StepLoop else "several optimizers"
    if own is not StepLoop and own.__module__.startswith("loopkit."):
        raise refuse(f"{own.__name__}, a step of loopkit's", "take the plain step, or your own")
    if hasattr(own, "state_dict"):
        raise refuse(f"the state of {own.__name__}", "keep it in buffers of the task")
    if ddp:
        raise refuse(
            f"{what} under strategy='ddp'",
            "which backward pass averages gradients is a decision of each step. Eject the run for "
            "one device, and put no_sync() and all_reduce() into backward() and update()",
        )
    if options.precision.startswith("fp16"):
        raise refuse(f"{what} with precision={options.precision!r}", "take 'bf16' or 'fp32'")
    if options.on_nan == "skip":
        raise refuse(f"{what} with on_nan='skip'", "take 'raise', or decide it in update()")


def try_step(run: Run, batches: Any) -> list[str]:
    """Do one step with the loop of the run; return the methods of the task that it calls.

    Raises:
        OptionError: a method returns a weight.
    """
    strategy, step_fn = run.strategy, run.strategy.step_fn
    rates = [(g, g["lr"]) for each in run.optimizers.values() for g in each.param_groups]
    called: list[str] = []

    def recorded(name: str) -> Any:
        method = step_fn(name)

        def call(batch: Any) -> Any:
            called.append(name)
            returned = method(batch)
            if read_step(returned, run.task, name)[1] is not None:
                raise refuse(
                    f"the weight that {name_of(run.task)}.{name} returns",
                    "a step of several passes weights by samples: return the loss alone",
                )
            return returned

        return call

    strategy.step_fn = recorded  # type: ignore[method-assign]
    try:
        run.loops.step.run(run, batches)
    finally:
        del strategy.step_fn
    for group, rate in rates:
        group["lr"] = rate
    return list(dict.fromkeys(called))


def loop_names(run: Run) -> set[str]:
    """Return the attributes that the code of a step of the user's own uses."""
    if type(run.loops.step) is StepLoop:
        return set()
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(type(run.loops.step))))
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def check_carried(source: SourceModule, text: str) -> None:
    """Refuse carried code that uses more of a run or of StepLoop than the script has.

    Raises:
        OptionError: naming the attribute.
    """
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Attribute) or not isinstance(node.value, ast.Name):
            continue
        if node.value.id == "run" and node.attr not in _OF_RUN:
            raise refuse(
                f"run.{node.attr} in {source.file}",
                f"the script's run has {', '.join(_OF_RUN)}. Do it in main()",
            )
        inherited = hasattr(StepLoop, node.attr) and not node.attr.startswith("__")
        if node.value.id == "self" and inherited and node.attr not in _OF_STEP:
            raise refuse(
                f"self.{node.attr} of StepLoop in {source.file}",
                f"the script's StepLoop has {', '.join(_OF_STEP)}",
            )


def optimizers_text(
    run: Run, specs: Mapping[str, Any]
) -> tuple[list[str], set[Import], dict[str, Any]]:
    """Return the functions that make the optimizers, their imports, and what the templates need.

    Raises:
        OptionError: an optimizer is torch's own, or follows no schedule that the script has.
    """
    pieces: list[str] = []
    needed: set[Import] = set()
    made: list[str] = []
    factors: list[str] = []
    texts: dict[str, str] = {}
    schedules: dict[str, dict[str, Any]] = {}
    for name, schedule in run.schedules.items():
        if not isinstance(schedule, RateSchedule):
            raise refuse(f"the schedule of the optimizer {name!r}", "take one of loopkit.optim")
        schedules[name] = schedule_context(schedule.schedule)
    needs_epoch = any(each["needs_epoch"] for each in schedules.values())
    for name, optimizer in run.optimizers.items():
        spec = specs.get(name)
        if not isinstance(spec, OptimizerSpec):
            raise refuse(
                f"torch's own {type(optimizer).__name__} here", "return a spec of loopkit.optim"
            )
        text, imports = optimizer_text(run.task, optimizer, spec, scheduled=name in schedules)
        key = name if name.isidentifier() else f"optimizer_{len(made)}"
        pieces.append(text.replace("def make_optimizer(", f"def make_{key}("))
        needed |= imports
        made.append(f"{literal(name)}: make_{key}(model)")
        if name in schedules:
            written = render("schedule", {**schedules[name], "needs_epoch": needs_epoch})
            if written not in texts:
                texts[written] = "factor" if not texts else f"{key}_factor"
            factors.append(f"{literal(name)}: {texts[written]}")
    pieces += [text.replace("def factor(", f"def {key}(") for text, key in texts.items()]
    if factors:
        pieces.append(fold(0, "FACTORS = {", factors, "}"))
    return pieces, needed, {"made": made, "scheduled": bool(factors), "needs_epoch": needs_epoch}
