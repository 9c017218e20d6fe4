"""Generate the script of a run: what the templates need to know, and the pieces in their order."""

from __future__ import annotations

import ast
import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from loopkit.cli.eject.carry import Carrier
from loopkit.cli.eject.inspection import Inspected, inspected
from loopkit.cli.eject.layout import WIDTH, fold, literal
from loopkit.cli.eject.optimizer import optimizer_text
from loopkit.cli.eject.reading import reading_context
from loopkit.cli.eject.refusals import left_out, refuse, uses_ddp
from loopkit.cli.eject.schedule import schedule_context
from loopkit.cli.eject.script import join, render
from loopkit.cli.eject.source import SourceModules
from loopkit.cli.eject.task_class import TaskClasses
from loopkit.cli.eject.training import constants, training_context
from loopkit.data.indexed import IndexedSource
from loopkit.fit.strategy_setup import processes_wanted
from loopkit.optim.lr_schedulers import RateSchedule
from loopkit.optim.specs import OptimizerSpec
from loopkit.optim.torch_scheduler import TorchSchedule
from loopkit.options import Options
from loopkit.task import Task
from loopkit.version import __version__


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
        spec = _spec(found.optimizers)
        modules = SourceModules()
        classes = TaskClasses(kind, modules, keeps_optimizers=spec is None)
        carrier = Carrier(classes, modules)
        carrier.carry(modules.of(kind.__module__), kind.__name__)
        context = _context(found, options, keeps_optimizers=spec is None) | {"model": model}
        context["host_random"] = _draws_on_host(carrier)
        pieces = [render("seeds", context), render("data", context)]
        if spec is not None:
            (optimizer,) = found.run.optimizers.values()
            text, needed = optimizer_text(task, optimizer, spec, scheduled=context["scheduled"])
            pieces.append(text)
            carrier.imports |= needed
        if context["scheduled"]:
            pieces.append(render("schedule", context))
        pieces += [render(name, context) for name in ("device", "step", "checkpoint", "main")]
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


def _spec(described: Any) -> OptimizerSpec | None:
    """Return the spec of the optimizer; None where the task makes torch's own."""
    if isinstance(described, Mapping):
        (described,) = described.values()
        if not isinstance(described, OptimizerSpec):
            raise refuse("a dict of torch optimizers", "return the optimizer itself")
    if isinstance(described, tuple):
        described = described[0]
    return described if isinstance(described, OptimizerSpec) else None


def _context(found: Inspected, options: Options, *, keeps_optimizers: bool) -> dict[str, Any]:
    """Return all that the templates need."""
    run = found.run
    ddp = uses_ddp(options.strategy, processes_wanted(options))
    accumulate = run.train_loader.accumulate
    global_batch = options.global_batch_size if ddp else None
    several = global_batch is not None or accumulate > 1
    schedule = next(iter(run.schedules.values()), None)
    scheduled = isinstance(schedule, RateSchedule)
    context: dict[str, Any] = {
        "ddp": ddp,
        "several": several,
        "global_batch": global_batch,
        "accumulate": "ACCUMULATE" if global_batch is None else "accumulate",
        "accumulation": accumulate if several and global_batch is None else None,
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
