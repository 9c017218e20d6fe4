"""Help: every option with its type, default and what it does."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping

from loopkit.cli.args.option_names import Names
from loopkit.cli.args.signature import Argument

WIDTH = 110
INDENT = 26


def help_text(
    usage: str, about: str, command: Mapping[str, str], names: Names, task_about: str = ""
) -> str:
    """The help of a command that runs a task: the command's own options, Fit's and the task's."""
    blocks = [f"usage: loopkit {usage}", textwrap.fill(about, WIDTH), "Options of the command:"]
    blocks.append(_lines(command.items()))
    if names.task:
        blocks.append(f"Arguments of {names.title}{f': {task_about}' if task_about else ''}")
        blocks.append(_lines((_typed_name(one, names), _about(one)) for one in names.task.values()))
    blocks += [
        "Options of Fit (a - in a name is as good as a _):",
        _lines(entry for one in names.fit.values() for entry in _with_fields(one)),
    ]
    return "\n\n".join(blocks)


def _with_fields(one: Argument) -> list[tuple[str, str]]:
    fields = one.fields().values()
    return [
        (f"--{one.name}", _about(one)),
        *((f"--{one.name}.{field.name}", _about(field)) for field in fields),
    ]


def _typed_name(one: Argument, names: Names) -> str:
    return f"--{'task.' if one.name in names.fit else ''}{one.name}"


def _about(one: Argument) -> str:
    default = "required" if one.required else f"default {_shown(one.default)}" if one.plain else ""
    facts = ", ".join(fact for fact in (one.label, default) if fact)
    return f"{one.about.rstrip('.')}. [{facts}]" if one.about else f"[{facts}]"


def _shown(value: object) -> str:
    return (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    )


def _lines(entries: Iterable[tuple[str, str]]) -> str:
    lines = []
    for name, about in entries:
        wrapped = textwrap.wrap(about, WIDTH - INDENT) or [""]
        head = f"  {name}".ljust(INDENT)
        if len(head) > INDENT or not head.endswith(" "):
            lines.append(head)
        else:
            lines.append(head + wrapped.pop(0))
        lines += [" " * INDENT + line for line in wrapped]
    return "\n".join(lines)
