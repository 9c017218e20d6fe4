"""A call of a command that runs a task: the task's class, its arguments and the options of Fit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loopkit.checkpoint import check_state, load_checkpoint
from loopkit.cli.args.classes import summary
from loopkit.cli.args.config import Values, fit_parameters, read_values
from loopkit.cli.args.help import class_help, help_text
from loopkit.cli.args.option_table import OptionTable
from loopkit.cli.args.signature import parameters_of
from loopkit.cli.args.target import find_task
from loopkit.cli.args.tokens import Token, read_tokens, take_flag, take_value, take_values
from loopkit.distributed.environment import is_rank_zero
from loopkit.errors import OptionError
from loopkit.fit.fit import Fit
from loopkit.rng import seed_all
from loopkit.storage import as_url, fetch_checkpoint
from loopkit.task import Task

logger = logging.getLogger(__name__)

COMMON = {
    "--config FILE": "read options from a YAML file, with the task's arguments below task:. "
    "May be given several times; typed options replace what is read",
    "--print-config": "print all options as YAML for --config, and do nothing else",
    "--help": "show this text; after TARGET, with the arguments of the task",
    "--hooks.help [NAME]": "list the classes that --hooks takes, or the arguments of one. "
    "--loggers, --strategy and the four loops have the same",
}
CHECKPOINT = {
    "--checkpoint PATH": "load the weights from a checkpoint, or from the newest valid one of a "
    "run directory; a path or a URL. The task gets the arguments that it was trained with, unless others are typed",
}


@dataclass(frozen=True)
class Command:
    """A command that runs a task.

    Attributes:
        name: as it is typed.
        about: what the command does, in one line.
        options: its own options with their descriptions.
        hidden: options of Fit that it does not take.
        examples: what may stand after TARGET, each in a line of the help.
    """

    name: str
    about: str
    options: Mapping[str, str]
    hidden: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()

    def own_names(self) -> tuple[str, ...]:
        """Return the names of its own options."""
        flags = [shown.split()[0] for shown in (*self.options, *COMMON)]
        return tuple(flag.removeprefix("--").replace("-", "_") for flag in flags)


@dataclass
class Request:
    """A command line before the values are parsed.

    Attributes:
        task: the class that TARGET names.
        target: TARGET as it was typed.
        tokens: the options. A command takes its own out of them before ``values`` is called.
        configs: the files given with --config, in order.
        saved: constructor arguments from a checkpoint; typed arguments replace them.
    """

    command: Command
    task: type[Task]
    target: str
    tokens: list[Token]
    configs: list[str]
    print_config: bool
    saved: Mapping[str, Any]
    _fetched: TemporaryDirectory[str] | None = None  # it lives as long as this object

    def values(self) -> Values:
        """Return the values that were typed and read.

        Raises:
            OptionError: see ``read_values``.
        """
        return read_values(_option_table(self), self.tokens, self.configs)

    def build(self, values: Values) -> tuple[Fit, Task]:
        """Return the Fit and the task; what was not given keeps the default of the code."""
        fit = Fit(**values.fit)
        seed_all(fit.options.seed)  # for the weights that the constructor makes
        known = parameters_of(self.task)
        saved = {name: value for name, value in self.saved.items() if name in known}
        return fit, self.task(**{**saved, **values.task})

    def take_checkpoint(self) -> Path | None:
        """Take ``--checkpoint`` out of the tokens, and the task's arguments from the checkpoint.

        Returns:
            The checkpoint; None if the option is not given.

        Raises:
            CheckpointError: it is not there, or not valid.
        """
        typed = take_value(self.tokens, "checkpoint")
        if typed is None:
            _note(f"no --checkpoint: {self.task.__name__} keeps the weights it is built with")
            return None
        url = as_url(typed)
        if url is not None:
            self._fetched = TemporaryDirectory(prefix="loopkit-checkpoint-")
            folder = Path(self._fetched.name)
            found, _ = fetch_checkpoint(url, folder, option="--checkpoint ")
            typed = str(found)
        path, snapshot = load_checkpoint(Path(typed), option="--checkpoint ")
        check_state(snapshot.state, path, only=("task",))
        about = snapshot.state.get("task", {})
        self.saved = about.get("hparams", {})
        logger.info("the task's arguments are those of %s", path)
        names = {token.name.removeprefix("task.").partition(".")[0] for token in self.tokens}
        lost = [name for name in about.get("unsaved", []) if name not in names]
        if lost:
            _note(f"{path} does not hold {', '.join(lost)}: the default of the code is used")
        return path


def read_request(command: Command, argv: Sequence[str]) -> Request | None:
    """Read a command line.

    Returns:
        None if a help text was asked for, which is then printed.

    Raises:
        OptionError: TARGET is missing, or names no task.
    """
    target, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("", argv)
    tokens = read_tokens(rest)
    wants_help = take_flag(tokens, "help")
    if not target and not wants_help:
        raise OptionError(
            f"give the target first: loopkit {command.name} TARGET [--option value ...], where "
            "TARGET is path/to/file.py, path/to/file.py:Class or package.module:Class"
        )
    task = find_task(target) if target else Task
    logger.debug("%s is %s.%s", target, task.__module__, task.__qualname__)
    request = Request(command, task, target, tokens, [], print_config=False, saved={})
    if wants_help:
        print(_help(request))
        return None
    for token in tokens:
        if token.name.endswith(".help"):
            print(class_help(token.name.removesuffix(".help"), token.text))
            return None
    request.configs = take_values(tokens, "config")
    request.print_config = take_flag(tokens, "print_config")
    return request


def _option_table(request: Request) -> OptionTable:
    command, task, saved = request.command, request.task, request.saved
    arguments = parameters_of(task) if request.target else {}
    for name in saved.keys() & arguments.keys():
        arguments[name] = replace(arguments[name], default=saved[name])
    return OptionTable(
        fit={name: one for name, one in fit_parameters().items() if name not in command.hidden},
        task=arguments,
        command=command.own_names(),
        title=task.__name__,
        ignored=command.hidden,
        help=f"loopkit {command.name} {request.target or 'TARGET'} --help",
    )


def _help(request: Request) -> str:
    command, task = request.command, request.task
    about = summary(task) if request.target else ""
    usage = f"{command.name} {request.target or 'TARGET'} [--option value ...]"
    own = {**command.options, **COMMON}
    typed = f"loopkit {command.name} {request.target or 'task.py'}"
    examples = [f"{typed} {each}".rstrip() for each in command.examples]
    return help_text(usage, command.about, own, _option_table(request), about, examples)


def _note(text: str) -> None:
    if is_rank_zero():
        print(f"loopkit: {text}", file=sys.stderr)
