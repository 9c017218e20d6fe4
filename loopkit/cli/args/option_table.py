"""The options of a command, and which of them a name means, typed or in a config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from loopkit.cli.args.hints import hint
from loopkit.cli.args.signature import Parameter
from loopkit.errors import OptionError


@dataclass(frozen=True)
class OptionTable:
    """The options of Fit, the arguments of one task, and the command's own options.

    A bare name that is both an option of Fit and an argument of the task means the option.

    Attributes:
        fit: the options of Fit that the command takes.
        task: the constructor arguments of the task; empty while there is no target.
        command: names of the command's own options, for suggestions.
        title: the task's name, for messages.
        ignored: options of Fit that the command does not take, and that a config may hold.
        help: the command line that lists the options.
    """

    fit: Mapping[str, Parameter]
    task: Mapping[str, Parameter]
    command: tuple[str, ...] = ()
    title: str = "the task"
    ignored: tuple[str, ...] = ()
    help: str = "loopkit fit TARGET --help"

    def resolve(self, name: str, dashes: str = "--") -> str:
        """Return the full name: ``epochs``, ``checkpoint.every``, ``task.hidden``.

        Args:
            dashes: what stands before names in messages: "--", or nothing for a config.

        Raises:
            OptionError: there is no such option; the message names the one that was meant.
        """
        name = name.replace("-", "_")
        head, _, rest = name.partition(".")
        if head == "task" and head not in self.fit:
            return self._resolve_task(rest, dashes)
        if head in self.fit:
            self._check_field(self.fit[head], rest, dashes)
            return name
        if head in self.task:
            return f"task.{name}"
        known = {option: f"{dashes}{option}" for option in (*self.fit, *self.command)}
        for argument in self.task:
            known[f"task.{argument}"] = f"{dashes}task.{argument}"
            known.setdefault(argument, f"{dashes}{argument}")
        settings = [option for option, one in self.fit.items() if one.fields()]
        found = hint(name, "Fit", known, settings) or f" {self.help} lists them all"
        raise OptionError(f"there is no option {dashes}{name}.{found}")

    def parameter(self, full: str) -> Parameter:
        """Return the option with this full name; for ``checkpoint.every``, the field."""
        top, _, rest = full.removeprefix("task.").partition(".")
        one = (self.task if full.startswith("task.") else self.fit)[top]
        return one.fields().get(rest, one)

    def typed_name(self, name: str) -> str:
        """Return how an argument of the task is typed: ``--hidden``, ``--task.seed``."""
        return f"--task.{name}" if name in self.fit else f"--{name}"

    def _resolve_task(self, name: str, dashes: str) -> str:
        if name.partition(".")[0] in self.task:
            return f"task.{name}"
        takes = f"{self.title} takes {', '.join(self.task) or 'no arguments'}"
        if not name:
            raise OptionError(f"{dashes}task needs a name: {dashes}task.NAME. {takes}")
        found = hint(name, self.title, {each: f"{dashes}task.{each}" for each in self.task})
        raise OptionError(f"there is no option {dashes}task.{name}.{found} {takes}")

    def _check_field(self, option: Parameter, field: str, dashes: str) -> None:
        settings, fields = option.settings(), option.fields()
        if not field or settings is None or field.partition(".")[0] in fields:
            return
        known = {each: f"{dashes}{option.name}.{each}" for each in fields}
        found = hint(field, settings.__name__, known)
        raise OptionError(
            f"there is no option {dashes}{option.name}.{field}.{found} "
            f"There are {', '.join(fields)}"
        )
