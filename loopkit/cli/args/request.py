"""What one call of fit, evaluate or predict asks for: the task's class, its arguments and the
options of Fit.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from loopkit.cli.args.classes import class_help
from loopkit.cli.args.config import Values, fit_arguments, read_values
from loopkit.cli.args.help import help_text
from loopkit.cli.args.option_names import Names
from loopkit.cli.args.signature import Argument, arguments_of
from loopkit.cli.args.target import find_task
from loopkit.cli.args.tokens import Word, read_words, take_flag, take_values
from loopkit.errors import OptionError
from loopkit.fit.fit import Fit
from loopkit.task import Task

COMMON = {
    "--config FILE": "read options from YAML, the task's below task:. May be given several times; what is typed wins",
    "--print-config": "write all options as YAML that --config reads, and do nothing else",
    "--help": "this text; after TARGET it shows the task's arguments too",
    "--hooks.help [NAME]": "the classes that an option takes, or the arguments of one of them",
}


@dataclass(frozen=True)
class Command:
    """A command that runs a task: its name, what it is for, and its own options with their help."""

    name: str
    about: str
    options: Mapping[str, str]
    hidden: tuple[str, ...] = ()  # options of Fit that mean something else here

    def own(self) -> list[str]:
        """The names of its own options."""
        return [
            shown.split()[0].removeprefix("--").replace("-", "_")
            for shown in (*self.options, *COMMON)
        ]


@dataclass
class Request:
    """A command line, read as far as it goes without the values' types.

    Attributes:
        task: the class that TARGET names.
        words: the options that are Fit's or the task's.
        configs: files, in order.
        saved: constructor arguments that a checkpoint recorded; what is typed goes before them.
    """

    command: Command
    task: type[Task]
    words: list[Word]
    configs: list[str]
    print_config: bool
    saved: Mapping[str, Any]

    def values(self) -> Values:
        """Everything typed.

        Raises:
            OptionError: see ``read_values``.
        """
        return read_values(self._names(), self.words, self.configs)

    def build(self, values: Values) -> tuple[Fit, Task]:
        """The Fit and the task, made with what was given; defaults are left to the code."""
        fit = Fit(**values.fit)
        known = arguments_of(self.task)
        saved = {name: value for name, value in self.saved.items() if name in known}
        return fit, self.task(**{**saved, **values.task})

    def _names(self) -> Names:
        arguments = {
            name: _recorded(one, self.saved) for name, one in arguments_of(self.task).items()
        }
        return _names(self.command, arguments, self.task.__name__)


def read_request(command: Command, argv: Sequence[str]) -> tuple[Request | None, list[Word]]:
    """Read a command line.

    Returns:
        The request, and the words among which the command still has to take its own; no request
        when help was asked for and given.

    Raises:
        OptionError: there is no target, or it names no task.
    """
    target, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    words = read_words(rest)
    wants_help = take_flag(words, "help")
    if not target and not wants_help:
        raise OptionError(
            f"give the target first: loopkit {command.name} TARGET [--option value ...], where "
            f"TARGET is "
            "path/to/file.py, path/to/file.py:Class or package.module:Class"
        )
    task = find_task(target) if target else Task
    if wants_help:
        names = _names(command, arguments_of(task) if target else {}, task.__name__)
        about = (inspect.getdoc(task) or "").partition("\n")[0] if target and task.__doc__ else ""
        usage = f"{command.name} {target or 'TARGET'} [--option value ...]"
        print(help_text(usage, command.about, {**command.options, **COMMON}, names, about))
        return None, words
    for word in words:
        if word.name.endswith(".help"):
            print(class_help(word.name.removesuffix(".help"), word.value))
            return None, words
    configs = take_values(words, "config")
    return Request(command, task, words, configs, take_flag(words, "print_config"), {}), words


def _names(command: Command, task: Mapping[str, Argument], title: str) -> Names:
    fit = {name: one for name, one in fit_arguments().items() if name not in command.hidden}
    return Names(fit, task, tuple(command.own()), title, command.hidden)


def _recorded(one: Argument, saved: Mapping[str, Any]) -> Argument:
    return replace(one, default=saved[one.name]) if one.name in saved else one
