"""The values of a command line: configs and typed options, merged, parsed and written as YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from loopkit.cli.args.classes import read_call
from loopkit.cli.args.option_table import OptionTable
from loopkit.cli.args.parsing import build, load, parse, to_plain
from loopkit.cli.args.signature import Parameter, parameters_of
from loopkit.cli.args.tokens import Text, Token
from loopkit.cli.args.yaml_io import YAMLError, dump_yaml, load_yaml
from loopkit.errors import OptionError
from loopkit.fit.setup import LOOPS
from loopkit.options import Options


def fit_parameters() -> dict[str, Parameter]:
    """Return the options of Fit; an option that takes a loop has the type of that loop."""
    found = parameters_of(Options)
    for name, kind in LOOPS.items():
        found[name] = replace(found[name], hint=kind | None)
    return found


@dataclass(frozen=True)
class Values:
    """The values of a command line.

    Attributes:
        fit: the options of Fit that were given, by name.
        task: the arguments of the task's constructor that were given, by name.
        config: all values and defaults as YAML, except defaults that are objects.
    """

    fit: dict[str, Any]
    task: dict[str, Any]
    config: str


def read_values(table: OptionTable, tokens: Sequence[Token], configs: Sequence[str]) -> Values:
    """Read the configs, then the typed options; a later value replaces an earlier one.

    Raises:
        OptionError: a name is unknown, a value is not accepted, an argument is missing, or a
            config cannot be read.
    """
    given: dict[str, Any] = {}
    for path in configs:
        for full, value in read_config(table, Path(path)):
            _assign(table, given, full, value)
    for token in tokens:
        full = table.resolve(token.name)
        _assign(table, given, full, _text(table, full, token), append=token.append)
    _check_required(table, given)
    parsed = {name: parse(table.parameter(name).hint, given[name], (name,)) for name in given}
    built = {name: build(value) for name, value in parsed.items()}
    fit = {name: value for name, value in built.items() if name in table.fit}
    task = {name: built[f"task.{name}"] for name in table.task if f"task.{name}" in built}
    return Values(fit, task, dump_yaml(_to_config(table, parsed)))


def read_config(table: OptionTable, path: Path) -> list[tuple[str, Any]]:
    """Return the values in a YAML file by their full names.

    Raises:
        OptionError: the file cannot be read, or a name in it is unknown.
    """
    try:
        found = load_yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise OptionError(f"--config {path} cannot be read: {error.strerror}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise OptionError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise OptionError(f"--config {path} holds no options: write them as 'name: value' lines")
    try:
        return list(_flatten(table, found))
    except OptionError as error:
        raise OptionError(f"{path}: {error}") from error


def _flatten(table: OptionTable, config: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the values below ``task`` and below settings such as ``checkpoint`` one by one."""
    for key, value in config.items():
        name = str(key).replace("-", "_")
        if name in table.ignored:
            continue
        if name == "task" and not isinstance(value, Mapping | None):
            raise OptionError(
                f"task: {value!r} is not a mapping: give the task's arguments below it"
            )
        settings = name in table.fit and table.fit[name].fields() and isinstance(value, Mapping)
        if name == "task" or (settings and "class_path" not in value):
            for field, item in (value or {}).items():
                yield table.resolve(f"{name}.{field}", ""), item
        else:
            yield table.resolve(name, ""), value


def _text(table: OptionTable, full: str, token: Token) -> Text:
    if token.text is not None:
        return Text(token.text)
    if not table.parameter(full).accepts(bool):
        raise OptionError(f"{token.flag} needs a value")
    return Text("true")


def _assign(
    table: OptionTable, given: dict[str, Any], full: str, value: Any, *, append: bool = False
) -> None:
    """Set the option with this full name, or the field of it, in ``given``."""
    parts = full.split(".")
    depth = 2 if parts[0] == "task" else 1
    name = ".".join(parts[:depth])
    path = parts[depth:]
    old = given.get(name, table.parameter(name).default)
    if path and name not in given and isinstance(old, str):
        old = None  # a default such as "auto" has no fields
    given[name] = _replace(old, path, value, append)


def _replace(old: Any, path: Sequence[str], value: Any, append: bool) -> Any:
    """Return ``old`` with the value at ``path`` replaced; in a list the last item is meant."""
    if not path:
        return _append(old, value) if append else value
    if isinstance(old, list) and old:
        return [*old[:-1], _replace(old[-1], path, value, append)]
    call = read_call(old)
    fields: Any = call.named if call is not None else load(old)
    if is_dataclass(fields) and not isinstance(fields, type):
        fields = vars(fields)
    fields = dict(fields) if isinstance(fields, Mapping) else {}
    fields[path[0]] = _replace(fields.get(path[0]), path[1:], value, append)
    return fields if call is None else replace(call, named=fields)


def _append(old: Any, value: Any) -> list[Any]:
    items, added = load(old), load(value)
    if not isinstance(items, (list, tuple)):
        items = [items] if isinstance(items, (str, Mapping)) else []
    return [*items, *(added if isinstance(added, list) else [value])]


def _check_required(table: OptionTable, given: Mapping[str, Any]) -> None:
    missing = [
        f"{table.typed_name(name)} ({one.label})"
        for name, one in table.task.items()
        if one.required and f"task.{name}" not in given
    ]
    if missing:
        raise OptionError(f"{table.title} needs {', '.join(missing)}")


def _to_config(table: OptionTable, parsed: Mapping[str, Any]) -> dict[str, Any]:
    def plain(prefix: str, parameters: Mapping[str, Parameter]) -> dict[str, Any]:
        return {
            name: to_plain(parsed.get(f"{prefix}{name}", one.default))
            for name, one in parameters.items()
            if one.plain or f"{prefix}{name}" in parsed
        }

    task = plain("task.", table.task)
    return plain("", table.fit) | ({"task": task} if task else {})
