"""The parameters of a class: names, types, defaults and documentation of its constructor."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

SCALARS = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Parameter:
    """One parameter of a constructor.

    Attributes:
        hint: its type; Any if nothing is known about it.
        default: ``inspect.Parameter.empty`` if a value is required.
        about: its description in the docstring, on one line.
    """

    name: str
    hint: Any
    default: Any
    about: str

    @property
    def label(self) -> str:
        """The type as messages and help show it."""
        return spell(self.hint)

    @property
    def required(self) -> bool:
        """Whether a value must be given."""
        return self.default is inspect.Parameter.empty

    @property
    def plain(self) -> bool:
        """Whether the default can be written to a config."""
        return is_plain(self.default)

    def accepts(self, kind: type) -> bool:
        """Return whether ``kind`` is one of the types in the hint."""
        return kind in alternatives(self.hint)

    def settings(self) -> type | None:
        """Return the dataclass in the hint; None if there is none, or if other classes fit too."""
        kinds = [kind for kind in alternatives(self.hint) if is_class(kind)]
        classes: list[type] = [kind for kind in kinds if kind not in SCALARS]
        return classes[0] if len(classes) == 1 and is_dataclass(classes[0]) else None

    def fields(self) -> dict[str, Parameter]:
        """Return the parameters of the dataclass in the hint; empty without one."""
        settings = self.settings()
        return parameters_of(settings) if settings is not None else {}


def is_plain(value: Any) -> bool:
    """Return whether ``value`` consists only of scalars, lists, tuples and dicts of them."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return type(value) in SCALARS


def parameters_of(cls: type) -> dict[str, Parameter]:
    """Return the parameters of ``cls(...)`` by name, in order.

    A constructor with ``**kwargs`` takes the parameters of its base class too.
    """
    found: dict[str, Parameter] = {}
    for owner in cls.__mro__:
        init = vars(owner).get("__init__")
        if not isinstance(init, types.FunctionType):
            continue
        about = _descriptions(init.__doc__, owner.__doc__, cls.__doc__)
        hints = _hints(owner, init)
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for one in parameters:
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and one.name not in found:
                hint = hints.get(one.name, Any)
                hint = _guess(one.default) if hint is Any else hint
                found[one.name] = Parameter(one.name, hint, one.default, about.get(one.name, ""))
        if all(one.kind is not one.VAR_KEYWORD for one in parameters):
            break
    return found


def spell(hint: Any) -> str:
    """Return a type as people write it: ``int | null``, ``'raise' | 'skip'``, ``list[str]``."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return "any"
    if hint in (None, type(None)):
        return "null"
    if origin in (Union, types.UnionType):
        return " | ".join(map(spell, args))
    if origin is Literal:
        return " | ".join(map(repr, args))
    if isinstance(origin, type) and args and all(map(_is_type, args)):
        name = {"Sequence": "list", "Mapping": "dict"}.get(origin.__name__, origin.__name__)
        return f"{name}[{', '.join(map(spell, args))}]"
    return hint.__name__ if is_class(hint) else str(hint).replace("typing.", "")


def _is_type(hint: Any) -> bool:
    return hint is Any or is_class(hint) or get_origin(hint) is not None


def alternatives(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; any other type by itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_class(hint: Any) -> bool:
    """Return whether the type is a class without type arguments."""
    return isinstance(hint, type) and get_origin(hint) is None and hint is not Any


def _guess(default: Any) -> Any:
    """Return a type for a parameter without a hint, from its default."""
    if type(default) is int:
        return int | float
    return type(default) if type(default) in (float, str, bool) else Any


def _hints(owner: type, init: types.FunctionType) -> dict[str, Any]:
    """Return the types that can be resolved.

    Each one is resolved by itself, so that a name imported for type checkers only costs no others.
    """
    scope = {**vars(sys.modules[owner.__module__]), **init.__globals__}
    found: dict[str, Any] = {}
    for name, hint in init.__annotations__.items():
        one = types.SimpleNamespace(__annotations__={name: hint})
        with suppress(NameError, AttributeError, TypeError, SyntaxError):
            found |= get_type_hints(one, scope)
    return found


def _descriptions(*docstrings: str | None) -> dict[str, str]:
    """Return the descriptions of parameters by name; the first docstring that has one counts."""
    found: dict[str, str] = {}
    for docstring in docstrings:
        for each in docstring_parser.parse(docstring or "").params:
            text = " ".join((each.description or "").replace("``", "").split())
            for name in each.arg_name.split(","):
                found.setdefault(name.strip(), text)
    return found
