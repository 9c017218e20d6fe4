"""Help texts: options and classes with types, defaults and descriptions."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from loopkit.cli.args.classes import BASES, choices, find_class, path_of, summary
from loopkit.cli.args.option_table import OptionTable
from loopkit.cli.args.signature import Parameter, parameters_of
from loopkit.errors import OptionError, nearest

INDENT = 26


def width() -> int:
    """Return the width of the terminal, within limits; 80 if there is none."""
    return max(60, min(100, shutil.get_terminal_size().columns))


def help_text(
    usage: str, about: str, command: Mapping[str, str], table: OptionTable, task_about: str = ""
) -> str:
    """Return the help of a command that runs a task.

    Args:
        command: the command's own options with their descriptions.
        task_about: a line about the task.
    """
    blocks = [f"usage: loopkit {usage}", textwrap.fill(about, width()), "Options of the command:"]
    blocks.append(lines(command.items()))
    if table.task:
        blocks.append(f"Arguments of {table.title}{f': {task_about}' if task_about else ''}")
        blocks.append(lines((table.typed_name(n), describe(one)) for n, one in table.task.items()))
    blocks += [
        "Options of Fit (- and _ in a name are the same):",
        lines(entry for one in table.fit.values() for entry in _with_fields(one)),
    ]
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
    fields = [(f"--{one.name}.{name}", describe(field)) for name, field in one.fields().items()]
    return [(f"--{one.name}", describe(one)), *fields]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)
