"""What jsonargparse says about a value, as one line that names option, value and what is accepted."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping

from loopkit.cli.args.signature import arguments_of
from loopkit.errors import nearest

_WORDS = {"NoneType": "null", "Sequence": "list", "collections.abc.Sequence": "list"}


def explain(message: str, known: Mapping[str, list[str]]) -> str:
    """One line for an error of the parser.

    Args:
        message: the exception's text.
        known: short names of classes by option, to suggest from.
    """
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message.partition("Given value")[0]))
    where = f"{key}: " if key else ""
    inside = re.search(r"Problem with given class_path '([^']+)':\s*\n\s*(\S.*)", message)
    unknown = re.search(r"Option '([^']+)' is not accepted", message)
    if unknown and inside:
        return where + _unknown_argument(inside[1], unknown[1])
    path = re.search(r"Expected a dot import path string: (.*)", message)
    if path:
        hint = nearest(path[1], known.get(key.partition(".")[0], []))
        return f"{where}there is no class {path[1]!r}.{hint} Give package.module.Class, or the short name of one"
    own = [
        line.strip(" -")
        for line in message.splitlines()
        if re.match(r"\s*- (?!Expected|Problem)", line)
    ]
    if own:
        return own[0]
    if inside and not inside[2].startswith(("Parser key", "Expected")):
        return f"{where}{inside[1]}: {inside[2]}{_nearest_class(inside[2])}"
    return where + (_wrong_value(message) or " ".join(message.split()))


def _unknown_argument(class_path: str, name: str) -> str:
    """The class takes no such argument: which ones it takes."""
    module, _, cls = class_path.rpartition(".")
    takes = list(arguments_of(getattr(importlib.import_module(module), cls)))
    return f"{cls} has no argument {name!r}.{nearest(name, takes)} It takes {', '.join(takes) or 'none'}"


def _nearest_class(message: str) -> str:
    lacking = re.fullmatch(r"module '(.+)' has no attribute '(.+)'", message)
    return f".{nearest(lacking[2], vars(importlib.import_module(lacking[1])))}" if lacking else ""


def _wrong_value(message: str) -> str:
    """The innermost value that was refused, and what would have been accepted in its place."""
    lines = re.findall(
        r"^([ -]*)Expected an? (.+?)(?:\. Got value: (.*))?$", message, flags=re.MULTILINE
    )
    if not lines:
        return ""
    deepest = max(len(indent) for indent, _, _ in lines)
    accepted = [_plainly(kind) for indent, kind, _ in lines if len(indent) == deepest]
    values = re.findall(r"(?:Given|Got) value: (.*)", message)
    choices = re.findall(r"'([^']*)'", " ".join(accepted))
    hint = nearest(values[0], choices) if values else ""
    return f"{values[0] if values else ''!r} is not accepted: give {' or '.join(dict.fromkeys(accepted))}.{hint}"


def _plainly(kind: str) -> str:
    kind = re.sub(r"^<class '(.+)'>$", r"\1", kind).removeprefix("typing.")
    literal = re.fullmatch(r"Literal\[(.+)\]", kind)
    return literal[1] if literal else _WORDS.get(kind, kind)
