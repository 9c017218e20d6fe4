"""Options from the command line and from YAML, typed by the signatures of Fit and of the task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader
from yaml import YAMLError

from loopkit.cli.args.classes import KINDS, classes_for
from loopkit.cli.args.messages import explain
from loopkit.cli.args.option_names import Names
from loopkit.cli.args.signature import Argument, arguments_of
from loopkit.cli.args.tokens import Word
from loopkit.errors import OptionError
from loopkit.fit.setup import LOOPS
from loopkit.options import Options


def fit_arguments() -> dict[str, Argument]:
    """The options of Fit; those that take a loop are typed by the loop they replace."""
    found = arguments_of(Options)
    for place, kind in LOOPS.items():
        found[place] = replace(found[place], hint=kind | None)
    return found


@dataclass(frozen=True)
class Values:
    """What was given, read and typed.

    Attributes:
        fit: the options of Fit by name, only those that were given.
        task: the same for the task's constructor.
        config: everything that can be written down, defaults included, as YAML.
    """

    fit: dict[str, Any]
    task: dict[str, Any]
    config: str


def read_values(names: Names, words: Sequence[Word], configs: Sequence[str]) -> Values:
    """Type what the configs and then the command line say; the later wins.

    Raises:
        OptionError: an unknown name, a value that is not accepted, a missing argument, an
            unreadable config.
    """
    parser = build_parser(names)
    given: set[str] = set()
    argv = [
        f"--config={json.dumps(_nested(read_config(names, Path(path), given)))}" for path in configs
    ]
    argv += [_argument(names, word, given) for word in words]
    _check_required(names, given)
    known = {
        option: [each.__name__ for each in classes_for(option)] for option in given & KINDS.keys()
    }
    parsed = _translating(lambda: parser.parse_args(argv), known)
    built = _translating(lambda: parser.instantiate(parsed, instantiate_groups=False), known)
    task = vars(built["task"]) if names.task else {}
    return Values(
        fit={name: value for name, value in vars(built).items() if name in given},
        task={name: value for name, value in task.items() if f"task.{name}" in given},
        config=_written(parser, parsed, names, given),
    )


def build_parser(names: Names) -> ArgumentParser:
    """A jsonargparse parser with every option under its full name."""
    parser = ArgumentParser(prog="loopkit", allow_abbrev=False, exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    for prefix, arguments in (("", names.fit), ("task.", names.task)):
        for name, one in arguments.items():
            hint = (
                one.hint | None if one.fields() else one.hint
            )  # a dataclass alone would become a group of options
            default = one.default if one.plain and not one.required else None
            if isinstance(default, tuple):
                default = list(
                    default
                )  # `+=` appends to a list, and overwrites the items of a tuple
            try:
                parser.add_argument(f"--{prefix}{name}", type=hint, default=default)
            except ValueError:  # a type that no text can be turned into
                parser.add_argument(f"--{prefix}{name}", type=Any, default=default)
    return parser


def read_config(names: Names, path: Path, given: set[str]) -> dict[str, Any]:
    """A YAML file's values by full name; notes in ``given`` what there is.

    Raises:
        OptionError: it cannot be read, or a name in it is not known.
    """
    try:
        found = get_loader("yaml")(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"--config {path} cannot be read: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found or {}, dict):
        raise OptionError(f"--config {path} holds no options: write them as 'name: value' lines")
    values: dict[str, Any] = {}
    try:
        for name, value in (found or {}).items():
            if str(name).replace("-", "_") in names.elsewhere:
                continue
            for full, inner in _flattened(names, str(name), value):
                values[full] = inner
                given.add(_top(full))
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error
    return values


def _flattened(names: Names, name: str, value: Any) -> list[tuple[str, Any]]:
    """One entry of a config by full names: the task's, and those of a settings object, each by
    itself.
    """
    if name == "task" and name not in names.fit:
        if not isinstance(value, Mapping | None):
            raise OptionError(f"task: {value!r} says nothing: give the task's arguments below it")
        return [(names.resolve(f"task.{inner}", ""), item) for inner, item in (value or {}).items()]
    full = names.resolve(name, "")
    if (
        isinstance(value, Mapping)
        and full in names.fit
        and names.fit[full].fields()
        and "class_path" not in value
    ):
        return [(names.resolve(f"{full}.{inner}", ""), item) for inner, item in value.items()]
    return [(full, value)]


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for full, value in values.items():
        *path, last = full.split(".")
        place = found
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return found


def _argument(names: Names, word: Word, given: set[str]) -> str:
    """A word as jsonargparse takes it; notes in ``given`` which option it sets."""
    full = names.resolve(word.name)
    given.add(_top(full))
    value = word.value
    if value is None:
        if not _argument_at(names, full).takes(bool):
            raise OptionError(f"{word.shown} needs a value")
        value = "true"
    return f"--{full}{'+' if word.append else ''}={value}"


def _argument_at(names: Names, full: str) -> Argument:
    top, _, rest = full.removeprefix("task.").partition(".")
    one = (names.task if full.startswith("task.") else names.fit)[top]
    return one.fields().get(rest, one)


def _top(full: str) -> str:
    return ".".join(full.split(".")[: 2 if full.startswith("task.") else 1])


def _check_required(names: Names, given: set[str]) -> None:
    missing = [
        one for name, one in names.task.items() if one.required and f"task.{name}" not in given
    ]
    if missing:
        shown = [
            f"--{'task.' if one.name in names.fit else ''}{one.name} ({one.label})"
            for one in missing
        ]
        raise OptionError(f"{names.title} needs {', '.join(shown)}")


def _translating(call: Callable[[], Namespace], known: Mapping[str, list[str]]) -> Namespace:
    try:
        return call()
    except ArgumentError as error:
        raise OptionError(explain(str(error), known)) from error
    except (ValueError, TypeError) as error:
        if not str(error).startswith(("Does not validate", "Parser key", "Problem with given")):
            raise
        raise OptionError(explain(str(error), known)) from error


def _written(parser: ArgumentParser, parsed: Namespace, names: Names, given: set[str]) -> str:
    """The values as YAML, without defaults that are objects: they stay as the code has them."""
    shown = parsed.clone()
    for prefix, arguments in (("", names.fit), ("task.", names.task)):
        for name, one in arguments.items():
            if not one.plain and f"{prefix}{name}" not in given:
                shown.pop(f"{prefix}{name}", None)
    shown.pop("config", None)
    text: str = parser.dump(shown, skip_unset=False, skip_validation=True)
    return text
