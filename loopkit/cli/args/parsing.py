"""Values of options: typed text and YAML become what the type of an option asks for.

``parse`` checks a value, ``build`` makes the objects in it, and ``to_plain`` gives what a config
holds.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import torch

from loopkit.cli.args.classes import ALSO, ClassCall, find_class, path_of, read_call
from loopkit.cli.args.signature import SCALARS, alternatives, is_class, parameters_of, spell
from loopkit.cli.args.tokens import Text
from loopkit.cli.args.yaml_io import load
from loopkit.errors import OptionError, nearest
from loopkit.foreign_values import OBJECTS
from loopkit.keywords import unknown_keyword

LISTS: dict[Any, type] = {
    list: list, tuple: tuple, set: set, frozenset: frozenset, collections.abc.Set: set,
    collections.abc.Sequence: list, collections.abc.MutableSequence: list,
    collections.abc.Collection: list, collections.abc.Iterable: list,
}  # fmt: skip
DICTS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
READERS: dict[Any, Callable[[str], Any]] = {
    int: int, float: lambda text: float(text.replace(".inf", "inf").replace(".nan", "nan")),
    str: str, Path: Path, bool: lambda text: BOOLEANS[text.lower()],
    NoneType: {"null": None}.__getitem__,
}  # fmt: skip
READ: dict[Any, tuple[type, ...]] = {
    int: (int,), float: (int, float), str: (str,), Path: (str, Path), bool: (bool,),
    NoneType: (NoneType,),
}  # fmt: skip
WORDS: dict[Any, str] = {
    int: "a whole number", float: "a number", str: "text", Path: "a path", bool: "true or false",
    NoneType: "null",
}  # fmt: skip
Location = tuple[
    str | int, ...
]  # the option's name, then the field or index at each level below it


class Refused(OptionError):
    """A value that its option does not accept.

    Attributes:
        location: where the value is.
        accepts: the type that is accepted, as people write it.
        reason: a sentence; empty if the value has another type.
    """

    def __init__(self, location: Location, value: Any, accepts: str, reason: str = "") -> None:
        self.location = location
        self.accepts = accepts
        self.reason = reason
        name = ".".join(part for part in location if isinstance(part, str))
        super().__init__(f"{name}: {reason or f'{value!r} is not accepted: give {accepts}.'}")


@dataclass(frozen=True)
class Call:
    """A class, and the parsed arguments with which it is to be built.

    Attributes:
        settings: whether a config holds the arguments without the name of the class.
    """

    cls: type
    arguments: Mapping[str, Any]
    settings: bool


def parse(hint: Any, value: Any, location: Location) -> Any:
    """Return ``value`` as ``hint`` asks for; objects are not built yet, but Calls.

    Args:
        hint: a type, as signatures have them.
        value: Text that was typed, or what YAML or a default holds.
        location: where the value is, for messages.

    Raises:
        Refused: the type does not accept the value.
    """
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    kind = get_origin(hint) or hint
    if len(alternatives(hint)) > 1:
        return _parse_union(hint, value, location)
    if kind is Literal:
        return _parse_choice({str(each): each for each in get_args(hint)}, value, location)
    if kind in LISTS:
        return _parse_list(hint, value, location)
    if kind in DICTS:
        return _parse_dict(hint, value, location)
    if kind in (type, collections.abc.Callable):
        return value if callable(value) else _find(object, value, location, spell(hint))
    if kind in READERS or kind is None:
        return _parse_scalar(kind or NoneType, value, location)
    if kind is torch.dtype:
        return _parse_dtype(value, location)
    if is_class(hint) and issubclass(hint, Enum):
        return _parse_choice(hint.__members__, value, location)
    if is_class(hint) and hint is not object and _has_instances(hint):
        return _parse_object(hint, value, location)
    found = load(value)
    is_object = isinstance(found, Mapping) and "class_path" in found
    return _parse_object(object, found, location) if is_object else found


def _has_instances(hint: type) -> bool:
    """Return whether isinstance works: a protocol or a TypedDict may be any value."""
    try:
        isinstance(None, hint)
    except TypeError:
        return False
    return True


def _parse_union(hint: Any, value: Any, location: Location) -> Any:
    """Try each type in turn; ``str`` and Path come last, because they accept any text."""
    refusals: list[Refused] = []
    for kind in sorted(alternatives(hint), key=lambda kind: (kind is Path, kind is str)):
        if kind is str and any(len(refused.location) > len(location) for refused in refusals):
            break  # a list or an object with a wrong value in it, not a text
        try:
            return parse(kind, value, location)
        except Refused as refused:
            refusals.append(refused)
    inner = max(refusals, key=lambda refused: len(refused.location))
    if len(inner.location) > len(location):
        raise inner
    named = [refused for refused in refusals if refused.accepts != "null"]
    reasons = [refused for refused in named if refused.reason]
    if reasons and (len(named) == 1 or not isinstance(value, str)):
        raise reasons[0]
    accepted = list(dict.fromkeys(refused.accepts for refused in refusals))
    if WORDS[float] in accepted and WORDS[int] in accepted:
        accepted.remove(WORDS[int])
    raise Refused(location, value, " or ".join(accepted))


def _parse_scalar(kind: Any, value: Any, location: Location) -> Any:
    if isinstance(value, READ[kind]) and not isinstance(value, Text):
        if kind is bool or not isinstance(value, bool):
            return value if value is None else kind(value)
    elif isinstance(value, Text):
        try:
            return READERS[kind](value)
        except (ValueError, KeyError):
            pass
    raise Refused(location, value, WORDS[kind])


def _parse_choice(choices: Mapping[str, Any], value: Any, location: Location) -> Any:
    for name, choice in choices.items():
        if value in (name, choice):
            return choice
    accepts = " or ".join(map(repr, choices))
    reason = f"{value!r} is not accepted: give {accepts}.{nearest(str(value), choices)}"
    raise Refused(location, value, accepts, reason)


def _parse_list(hint: Any, value: Any, location: Location) -> Any:
    kind = get_origin(hint) or hint
    hints = get_args(hint)
    items = load(value)
    if not isinstance(items, (list, tuple)):
        raise Refused(location, value, spell(hint), _why_no_list(items, value, location))
    if kind is not tuple or hints[1:] == (Ellipsis,) or not hints:
        hints = (hints[0] if hints else Any,) * len(items)
    if len(hints) != len(items):
        raise Refused(location, items, f"a list of {len(hints)}")
    found = [
        parse(hint, item, (*location, at)) for at, (hint, item) in enumerate(zip(hints, items))
    ]
    return LISTS[kind](found)


def _why_no_list(items: Any, value: Any, location: Location) -> str:
    flag = f"--{'.'.join(map(str, location))}"
    if isinstance(value, Text):
        meant = OBJECTS.get(value.partition("(")[0], "")
        if meant and not meant.startswith("loopkit."):
            return f"there is no class {value!r}: here that is {meant}"
        ours = meant.rpartition(".")[2]
        item = ours or value
        here = f": here that is {ours}, in a list" if ours else " is not a list"
        return f"{value!r}{here}: give {flag} '[{item}]', or {flag}+='{item}' to add to it"
    if isinstance(items, Mapping):
        return f"add an item first, as {flag}+=NAME, then its {', '.join(items)}"
    return ""


def _parse_dict(hint: Any, value: Any, location: Location) -> dict[Any, Any]:
    key_hint, item_hint = get_args(hint) or (Any, Any)
    items = load(value)
    if not isinstance(items, Mapping):
        raise Refused(location, value, spell(hint))
    return {
        parse(key_hint, key, location): parse(item_hint, item, (*location, str(key)))
        for key, item in items.items()
    }


def _parse_dtype(value: Any, location: Location) -> Any:
    found = getattr(torch, str(value).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise Refused(location, value, "a dtype of torch, such as bfloat16")
    return found


def _parse_object(base: type, value: Any, location: Location) -> Any:
    if isinstance(value, (base, *ALSO.get(base, ()))) and base is not object:
        return value
    call = read_call(value)
    fields = load(value)
    if call is None and is_dataclass(base) and isinstance(fields, Mapping):
        call = ClassCall("", (), fields)
    if call is None:
        reason = ""
        if isinstance(fields, Mapping):
            reason = f"{', '.join(fields)}: give the name of the class first, then its arguments"
        raise Refused(location, value, base.__name__, reason)
    cls = _find(base, call.name, location, base.__name__) if call.name else base
    if isinstance(cls, base) and not isinstance(cls, type):
        return cls
    if not isinstance(cls, type) or not issubclass(cls, (base, *ALSO.get(base, ()))):
        raise Refused(
            location, value, base.__name__, f"{call.name} is not derived from {base.__name__}"
        )
    arguments = _parse_arguments(cls, call, location)
    return Call(cls, arguments, settings=cls is base and is_dataclass(base))


def _parse_arguments(cls: type, call: ClassCall, location: Location) -> dict[str, Any]:
    parameters = parameters_of(cls)
    given = {**dict(zip(parameters, call.positional)), **call.named}
    inside = (*location, 0)  # the class is right: a union need not look further
    name = cls.__name__
    if len(call.positional) > len(parameters):
        raise Refused(inside, "", "", f"{name} takes {len(parameters)} arguments at most")
    for each in given:
        if each not in parameters:
            raise Refused(inside, "", "", str(unknown_keyword(name, each, parameters)))
    for one in parameters.values():
        if one.required and one.name not in given:
            raise Refused(inside, "", "", f"{name} needs {one.name} ({one.label})")
    return {
        name: parse(one.hint, given[name], (*location, name))
        for name, one in parameters.items()
        if name in given
    }


def _find(base: type, name: Any, location: Location, accepts: str) -> Any:
    try:
        return find_class(base, str(name))
    except LookupError as error:
        raise Refused(location, name, accepts, str(error.args[0])) from error


def build(value: Any) -> Any:
    """Return a parsed value with its objects built."""
    if isinstance(value, Call):
        return value.cls(**{name: build(item) for name, item in value.arguments.items()})
    if isinstance(value, dict):
        return {key: build(item) for key, item in value.items()}
    return type(value)(map(build, value)) if type(value) in (list, tuple) else value


def to_plain(value: Any) -> Any:
    """Return a parsed value as YAML can hold it, with the defaults of the objects in it."""
    if isinstance(value, Call):
        fields = {
            name: to_plain(value.arguments.get(name, one.default))
            for name, one in parameters_of(value.cls).items()
            if one.plain or name in value.arguments
        }
        if value.settings:
            return fields
        return {"class_path": path_of(value.cls)} | ({"init_args": fields} if fields else {})
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.name
    if hasattr(value, "__qualname__"):
        return path_of(value)
    return value if type(value) in SCALARS else str(value)
