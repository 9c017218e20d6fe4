"""Which option a name means, on the command line and in a config alike."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from loopkit.cli.args.signature import Argument
from loopkit.errors import OptionError, nearest
from loopkit.foreign_names import FOREIGN_NAMES, Reason


@dataclass(frozen=True)
class Names:
    """The options of Fit and the arguments of one task; of a name that is both, the bare form is
    Fit's.

    Attributes:
        fit: the options of Fit.
        task: the constructor arguments of the task; None while there is no target.
        more: further options of the command itself, for suggestions.
        title: the task's name, for messages.
        elsewhere: options of Fit that a config may hold and this command does without.
    """

    fit: Mapping[str, Argument]
    task: Mapping[str, Argument]
    more: tuple[str, ...] = ()
    title: str = "the task"
    elsewhere: tuple[str, ...] = ()

    def resolve(self, name: str, dashes: str = "--") -> str:
        """The full name: ``epochs``, ``checkpoint.every``, ``task.hidden``.

        Args:
            dashes: what precedes a name in messages: "--" on the command line, nothing in a config.

        Raises:
            OptionError: there is no such option, with the one that was probably meant.
        """
        name = name.replace("-", "_")
        head, _, rest = name.partition(".")
        if head == "task" and head not in self.fit:
            return self._of_task(rest, dashes)
        if head in self.fit:
            self._check_field(self.fit[head], rest, dashes)
            return name
        if head in self.task:
            return f"task.{name}"
        hint = _translated(name, dashes) or nearest(
            f"{dashes}{name}", [f"{dashes}{known}" for known in self._known()]
        )
        raise OptionError(f"there is no option {dashes}{name}.{hint}")

    def _of_task(self, name: str, dashes: str) -> str:
        if name.partition(".")[0] in self.task:
            return f"task.{name}"
        takes = (
            f"{self.title} takes {', '.join(self.task)}"
            if self.task
            else f"{self.title} takes no arguments"
        )
        if not name:
            raise OptionError(f"{dashes}task alone says nothing: give {dashes}task.NAME. {takes}")
        hint = nearest(f"{dashes}task.{name}", [f"{dashes}task.{known}" for known in self.task])
        raise OptionError(f"there is no option {dashes}task.{name}.{hint} {takes}")

    def _check_field(self, option: Argument, rest: str, dashes: str) -> None:
        fields = option.fields()
        if rest and fields and rest not in fields:
            known = [f"{dashes}{option.name}.{field}" for field in fields]
            hint = nearest(f"{dashes}{option.name}.{rest}", known)
            raise OptionError(
                f"there is no option {dashes}{option.name}.{rest}.{hint} There are "
                f"{', '.join(fields)}"
            )

    def _known(self) -> list[str]:
        return [*self.fit, *self.task, *self.more, *(f"task.{name}" for name in self.task)]


def _translated(name: str, dashes: str) -> str:
    """What a name of another trainer is here; empty for any other name."""
    meant = FOREIGN_NAMES["Fit"].get(name)
    if meant is None:
        return ""
    if isinstance(meant, Reason):
        return f" {meant[0].upper()}{meant[1:]}"
    return f" Here that is {_on_command_line(meant) if dashes else meant}"


def _on_command_line(meant: str) -> str:
    """``name=value`` of Python as options; what cannot be written so stays as it is."""
    if meant.isidentifier():
        return f"--{meant}"
    try:
        call = ast.parse(f"f({meant})", mode="eval").body
        keywords = call.keywords if isinstance(call, ast.Call) else []
        return " ".join(_typed(each) for each in keywords) or meant
    except (SyntaxError, ValueError):
        return meant


def _typed(keyword: ast.keyword, prefix: str = "--") -> str:
    """``name=value`` of Python as it is typed on the command line."""
    name, value = f"{prefix}{keyword.arg}", keyword.value
    if isinstance(value, ast.Call):
        return " ".join(_typed(inner, f"{name}.") for inner in value.keywords)
    text = ast.literal_eval(value)
    if isinstance(text, tuple):
        return f"{name} '[{', '.join(map(str, text))}]'"
    shown = str(text).lower() if isinstance(text, bool) else str(text)
    return f"{name} '{shown}'" if " " in shown else f"{name} {shown}"
