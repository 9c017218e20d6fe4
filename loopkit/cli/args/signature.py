"""What a class takes to be built: its constructor's arguments with types, defaults and
documentation.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

_LISTS = {"Sequence": "list"}
PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Argument:
    """One constructor argument.

    Attributes:
        hint: its type, for jsonargparse; Any where nothing is known.
        default: ``inspect.Parameter.empty`` where it must be given.
        about: from the docstring, on one line.
    """

    name: str
    hint: Any
    default: Any
    about: str

    @property
    def label(self) -> str:
        """The type, for people."""
        return spell(self.hint)

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def plain(self) -> bool:
        """Whether the default can be written in a config."""
        return is_plain(self.default)

    def takes(self, kind: type) -> bool:
        """Whether ``kind`` is among the types it accepts."""
        return kind in _alternatives(self.hint)

    def fields(self) -> dict[str, Argument]:
        """The arguments of the dataclass it accepts besides plain values, if it does."""
        for kind in _alternatives(self.hint):
            if isinstance(kind, type) and hasattr(kind, "__dataclass_fields__"):
                return arguments_of(kind)
        return {}


def is_plain(value: Any) -> bool:
    """Whether ``value`` consists of strings, numbers, booleans, None, lists, tuples and dicts
    alone.
    """
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return type(value) in PLAIN


def arguments_of(cls: type) -> dict[str, Argument]:
    """The arguments of ``cls(...)`` by name, those that ``**kwargs`` hands on to a base class
    included.
    """
    found: dict[str, Argument] = {}
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        if not isinstance(init, types.FunctionType):
            continue
        about, hints = _documented(cls, owner, init), _hints(owner, init)
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for one in parameters:
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and one.name not in found:
                hint = hints.get(one.name, Any)
                if hint is Any:
                    hint = _guess(one.default)
                found[one.name] = Argument(
                    one.name, text_last(hint), one.default, about.get(one.name, "")
                )
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return found


def text_last(hint: Any) -> Any:
    """The type with ``str`` at the end of each union: every text is a string, so it would hide what
    follows.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        inner = [text_last(arg) for arg in args]
        return Union[tuple(sorted(inner, key=lambda arg: 2 if arg is Path else int(arg is str)))]  # noqa: UP007
    if isinstance(hint, types.GenericAlias) and isinstance(origin, type) and Ellipsis not in args:
        return types.GenericAlias(origin, tuple(text_last(arg) for arg in args))
    return hint


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _guess(default: Any) -> Any:
    """A type for an argument that has none written down, from its default."""
    if type(default) is int:
        return int | float
    return type(default) if type(default) in (float, str, bool) else Any


def spell(hint: Any) -> str:
    """A type as it is read: ``int | null``, ``'raise' | 'skip'``, ``list[str]``."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any"
    if hint in (None, type(None)):
        return "null"
    if origin in (Union, types.UnionType):
        return " | ".join(map(spell, args))
    if origin is Literal:
        return " | ".join(map(repr, args))
    if (
        isinstance(origin, type)
        and args
        and all(isinstance(arg, type) or get_origin(arg) for arg in args)
    ):
        return f"{_LISTS.get(origin.__name__, origin.__name__)}[{', '.join(map(spell, args))}]"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _hints(owner: type, init: types.FunctionType) -> dict[str, Any]:
    """The types that can be made out; a name that exists for type checkers alone costs only its own
    argument.
    """
    scope = {**vars(sys.modules[owner.__module__]), **init.__globals__}
    found: dict[str, Any] = {}
    for name, hint in init.__annotations__.items():
        one = types.SimpleNamespace(__annotations__={name: hint})
        with suppress(NameError, AttributeError, TypeError, SyntaxError):
            found |= get_type_hints(one, scope)
    return found


def _documented(cls: type, owner: type, init: types.FunctionType) -> dict[str, str]:
    """Argument descriptions of the docstrings of the constructor, its class and the class that is
    built.
    """
    found: dict[str, str] = {}
    for text in (init.__doc__, owner.__doc__, cls.__doc__):
        if text:
            for each in docstring_parser.parse(text).params:
                found.setdefault(
                    each.arg_name, " ".join((each.description or "").replace("``", "").split())
                )
    return found
