"""Generate the script of a run: what the templates need to know, and the pieces in their order."""

from __future__ import annotations

import ast
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from loopkit.cli.eject.carry import Carrier, padded_text
from loopkit.cli.eject.hf_task import hf_task_text
from loopkit.cli.eject.inspection import Inspected, inspected
from loopkit.cli.eject.layout import WIDTH, fold, literal
from loopkit.cli.eject.loop import loop_names, needs_loop, optimizers_text
from loopkit.cli.eject.optimizer import optimizer_text
from loopkit.cli.eject.reading import reading_context
from loopkit.cli.eject.refusals import left_out, refuse, uses_ddp
from loopkit.cli.eject.schedule import schedule_context
from loopkit.cli.eject.script import join, render
from loopkit.cli.eject.source import Import, SourceModules
from loopkit.cli.eject.task_class import TaskClasses
from loopkit.cli.eject.training import constants, training_context
from loopkit.data.indexed import IndexedSource
from loopkit.fit.strategy_setup import processes_wanted
from loopkit.interop.huggingface import HFTask
from loopkit.loops import StepLoop
from loopkit.optim.lr_schedulers import RateSchedule
from loopkit.optim.specs import OptimizerSpec
from loopkit.optim.torch_scheduler import TorchSchedule
from loopkit.options import Options
from loopkit.run import Run
from loopkit.task import Task
from loopkit.version import __version__

OWN_STEP = 'model.loops()["step"]'


def generate(
    task: Task,
    options: Options,
    arguments: Mapping[str, Any],
    command: Sequence[str],
    name: str = "SCRIPT.py",
) -> str:
    """Return the script of a run.

    Args:
        task: a task as its constructor made it. It is used up.
        options: the options of the run.
        arguments: the arguments that the constructor was given, by name.
        command: the words of the command that trains the same with loopkit.
        name: the name of the script's file.

    Raises:
        OptionError: the run has what the script cannot hold.
        LoopkitError: the run cannot be prepared, as in ``loopkit fit``.
    """
    kind = type(task)
    model = _constructor(kind.__name__, arguments)
    with inspected(task, options) as found:
        specs = _specs(found)
        keeps = not any(isinstance(spec, OptimizerSpec) for spec in specs.values())
        context = _context(found, options, keeps_optimizers=keeps) | {"model": model}
        optimizers, needed = _optimizers(found, specs, context)
        modules = SourceModules()
        called = [*found.methods, *loop_names(found.run)]
        if context["loop"] == OWN_STEP:
            called.append("loops")
        if context["step_end"]:
            called.append("on_step_end")
        classes = TaskClasses(kind, modules, keeps_optimizers=keeps, called=called)
        carrier = Carrier(classes, modules, _provided(found, context), ddp=context["ddp"])
        carrier.carry(modules.of(kind.__module__), kind.__name__)
        carrier.imports |= needed
        context["host_random"] = _draws_on_host(carrier)
        pieces = [render("seeds", context), render("data", context), *optimizers]
        rest = ["device", "step", "checkpoint", "main"]
        pieces += [render(name, context) for name in rest if name != "step" or not context["loop"]]
        skipped = list(left_out(options, found.run))
    start = f"torchrun --nproc-per-node 2 {name}" if context["ddp"] else f"python {name}"
    header = _header(kind.__name__, start, command, skipped)
    top = constants(options, context)
    return join(header, top, carrier.pieces(), pieces, carrier.imports)


def _draws_on_host(carrier: Carrier) -> bool:
    """Return whether the user's code may draw from Python's or NumPy's random numbers."""
    numpy = any(each.module.split(".")[0] == "numpy" for each in carrier.imports)
    texts = carrier.pieces() if numpy else ()
    return any(each.module == "random" for each in carrier.imports) or any(
        ".random" in text for text in texts
    )


def _specs(found: Inspected) -> dict[str, Any]:
    """Return what describes each optimizer: a spec, or torch's own optimizer."""
    described = found.optimizers
    if not isinstance(described, Mapping):
        described = {"main": described}
    return {name: each[0] if isinstance(each, tuple) else each for name, each in described.items()}


def _optimizers(
    found: Inspected, specs: Mapping[str, Any], context: dict[str, Any]
) -> tuple[list[str], set[Import]]:
    """Return the code that makes optimizers and schedules, and its imports; complete ``context``."""
    if context["loop"]:
        pieces, needed, more = optimizers_text(found.run, specs)
        context |= more
        return pieces, needed
    ((name, spec),) = specs.items()
    if not isinstance(spec, OptimizerSpec):
        if isinstance(found.optimizers, Mapping):
            raise refuse("a dict of torch optimizers", "return the optimizer itself")
        return [], set()
    optimizer = found.run.optimizers[name]
    text, needed = optimizer_text(found.run.task, optimizer, spec, scheduled=context["scheduled"])
    schedules = [render("schedule", context)] if context["scheduled"] else []
    return [text, *schedules], needed


def _provided(found: Inspected, context: dict[str, Any]) -> dict[str, str]:
    """Return the classes that stand for loopkit's StepLoop and HFTask, by name."""
    provided: dict[str, str] = {}
    if context["loop"]:
        provided |= {"StepLoop": render("loop", context), "Run": "", "MicroBatches": ""}
    if isinstance(found.run.task, HFTask):
        source = found.run.train_loader.source
        assert isinstance(source, IndexedSource)
        text = hf_task_text(found.run.task, source.loader.dataset, found.batch)
        provided |= {"HFTask": text, "Loader": ""}
        if "Padded(" in text:
            provided["Padded"] = padded_text("Padded")
    return provided


def _context(found: Inspected, options: Options, *, keeps_optimizers: bool) -> dict[str, Any]:
    """Return all that the templates need."""
    run = found.run
    ddp = uses_ddp(options.strategy, processes_wanted(options))
    accumulate = run.train_loader.accumulate
    global_batch = options.global_batch_size if ddp else None
    several = global_batch is not None or accumulate > 1
    loop = needs_loop(run)
    schedule = None if loop else next(iter(run.schedules.values()), None)
    scheduled = isinstance(schedule, RateSchedule)
    context: dict[str, Any] = {
        "ddp": ddp,
        "several": several,
        "global_batch": global_batch,
        "accumulate": "ACCUMULATE" if global_batch is None else "accumulate",
        "accumulation": accumulate if several and global_batch is None else None,
        "loop": _loop(run) if loop else None,
        "made": [],
        "scheduled": scheduled,
        "needs_epoch": False,
        "scheduler": isinstance(schedule, TorchSchedule),
        "optimizer_call": "model.optimizers()" if keeps_optimizers else "make_optimizer(model)",
        "title": literal(f"Train {type(run.task).__name__}."),
    }
    if isinstance(schedule, RateSchedule):
        context |= schedule_context(schedule.schedule)
    source = run.train_loader.source
    assert isinstance(source, IndexedSource)  # check_run refuses others
    context |= reading_context(source, found.data, options, context)
    return context | training_context(found, options, context)


def _loop(run: Run) -> str:
    return "StepLoop()" if type(run.loops.step) is StepLoop else OWN_STEP


def _constructor(name: str, arguments: Mapping[str, Any]) -> str:
    shown = []
    for key, value in arguments.items():
        text = literal(value)
        try:
            ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise refuse(
                f"{name}({key}={text})", "give a number, a text, or a list or dict of them"
            ) from None
        shown.append(f"{key}={text}")
    return fold(4, f"model = {name}(", shown, ")")


def _header(task: str, start: str, command: Sequence[str], skipped: Sequence[str]) -> str:
    shown = textwrap.wrap(
        shlex.join(command), WIDTH - 4, break_long_words=False, break_on_hyphens=False
    )
    paragraphs = [
        f"Train {task} in plain PyTorch.",
        "\n".join(_indented([start, f"{start} --resume"])),
        f"loopkit {__version__} wrote this script, which does not need it. On the same machine, with "
        f"torch {torch.__version__}, it gives the weights of this command, bit for bit:",
        "\n".join(_indented(shown)),
    ]
    if skipped:
        paragraphs.append(f"Left out, because no weight depends on it: {', '.join(skipped)}.")
    filled = [p if p.startswith("    ") else textwrap.fill(p, WIDTH) for p in paragraphs]
    return "\n\n".join(filled).replace('"""', "'''") + "\n"


def _indented(lines: Sequence[str]) -> Iterator[str]:
    return (f"    {line}" for line in lines)
