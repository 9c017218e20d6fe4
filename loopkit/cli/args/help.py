"""Help texts: options and classes with types, defaults and descriptions."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loopkit.cli.args.classes import BASES, choices, find_class, path_of, summary
from loopkit.cli.args.option_table import OptionTable
from loopkit.cli.args.signature import Parameter, parameters_of
from loopkit.errors import OptionError, nearest

INDENT = 26

# The options of Fit by what they are for. A test compares with the options that there are.
GROUPS = {
    "How long": ("epochs", "steps", "time", "job_margin"),
    "Data and batches": (
        "batch_size", "eval_batch_size", "global_batch_size", "accumulate", "micro_batch", "limit_train",
        "limit_eval",
    ),
    "Numbers": (
        "precision", "clip_norm", "clip_value", "on_nan", "seed", "data_seed", "rng", "deterministic",
    ),
    "Evaluate and log": ("eval_every", "eval_after", "eval_first", "log_every", "loggers", "progress"),
    "Save and resume": ("run_dir", "resume", "checkpoint"),
    "Devices, speed and memory": (
        "strategy", "devices", "nodes", "accelerator", "device_map", "compile", "activation_checkpointing",
    ),
    "Find mistakes": ("dry_run", "overfit", "debug"),
    "Hooks and loops": ("hooks", "step", "epoch", "eval", "predict"),
}  # fmt: skip
# How an option is typed whose value is an object.
TYPED = {
    "hooks": "Add one with --hooks+=EarlyStop, and its arguments with --hooks.patience 3. "
    "--hooks.help lists the classes, --hooks.help EarlyStop the arguments of one",
    "loggers": "Add one with --loggers+=csv. --loggers.help lists the classes",
    "strategy": "An object's arguments follow, as in --strategy DDP --strategy.bucket_cap_mb 50. "
    "--strategy.help lists the classes",
    "checkpoint": "Set one field with --checkpoint.every '100 steps'",
    "step": "Give the class by its path, as in --step=package.module.MyStep",
}


def width() -> int:
    """Return the width of the terminal, but at least 60; 80 if there is none."""
    return max(60, shutil.get_terminal_size().columns)


def help_text(
    usage: str,
    about: str,
    command: Mapping[str, str],
    table: OptionTable,
    task_about: str = "",
    examples: Sequence[str] = (),
) -> str:
    """Return the help of a command that runs a task.

    Args:
        command: the command's own options with their descriptions.
        task_about: a line about the task.
        examples: command lines to show.
    """
    blocks = [f"usage: loopkit {usage}", textwrap.fill(about, width())]
    if examples:
        blocks += ["Examples:", "\n".join(f"  {line}" for line in examples)]
    blocks += ["Options of the command:", lines(command.items())]
    if table.task:
        title = f"Arguments of {table.title}{f': {task_about}' if task_about else ''}"
        blocks.append(textwrap.fill(title, width()))
        blocks.append(lines((table.typed_name(n), describe(one)) for n, one in table.task.items()))
    blocks.append("Options of Fit (- and _ in a name are the same):")
    for title, names in GROUPS.items():
        found = [table.fit[name] for name in names if name in table.fit]
        if found:
            blocks.append(f"{title}\n" + lines(e for one in found for e in _with_fields(one)))
    return "\n\n".join(blocks)


def class_help(option: str, name: str | None) -> str:
    """Return the classes that ``option`` takes; or, with a class's name or path, its arguments.

    Raises:
        OptionError: the option takes no classes, or none of that name.
    """
    if option not in BASES:
        raise OptionError(f"--{option}.help: only {', '.join(BASES)} take classes")
    known = choices(option)
    if name is None:
        head = f"Classes for --{option}, in loopkit and in the target:"
        return "\n\n".join([head, lines((cls.__name__, summary(cls)) for cls in known)])
    try:
        cls = find_class(BASES[option], name)
    except LookupError:
        cls = None
    if cls not in known:
        names = [each.__name__ for each in known]
        there = f"There are {', '.join(names) or 'none'}"
        raise OptionError(
            f"--{option}.help: there is no class {name!r}.{nearest(name, names)} {there}"
        )
    arguments = ((f"--{option}.{n}", describe(one)) for n, one in parameters_of(cls).items())
    return "\n\n".join(
        [textwrap.fill(f"{path_of(cls)}: {summary(cls)}", width()), lines(arguments)]
    )


def describe(one: Parameter) -> str:
    """Return a parameter's description, type and default: ``width of the layer. [int, default 8]``."""
    default = "required" if one.required else f"default {_shown(one.default)}" if one.plain else ""
    facts = f"[{', '.join(fact for fact in (one.label, default) if fact)}]"
    return f"{one.about.rstrip('.')}. {facts}" if one.about else facts


def lines(entries: Iterable[tuple[str, str]]) -> str:
    """Return names and descriptions in two columns."""
    found: list[str] = []
    for name, about in entries:
        wrapped = textwrap.wrap(about, width() - INDENT) or [""]
        head = f"  {name}"
        if len(head) < INDENT:  # else the name has a line of its own
            head = head.ljust(INDENT) + wrapped.pop(0)
        found += [head.rstrip(), *(" " * INDENT + line for line in wrapped)]
    return "\n".join(found)


def _with_fields(one: Parameter) -> list[tuple[str, str]]:
    typed = _dashed(one.name)
    fields = [
        (f"--{typed}.{_dashed(name)}", describe(field)) for name, field in one.fields().items()
    ]
    more = f". {TYPED[one.name]}" if one.name in TYPED else ""
    about = f"{one.about.rstrip('.')}{more}"
    return [(f"--{typed}", describe(replace(one, about=about))), *fields]


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
