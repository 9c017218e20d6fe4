"""The arguments of a task's constructor: recorded when it is called, and given to it again."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _signature(cls: Any) -> inspect.Signature:
    """Return the signature of the constructor of ``cls``, with ``self``."""
    return inspect.signature(cls.__init__)


def record(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of ``cls`` by name, with defaults.

    Those of ``*args`` are a tuple under its name, those of ``**kwargs`` are under their own names.
    Arguments that do not fit give an empty dict: the constructor itself reports them.
    """
    try:
        bound = _signature(cls).bind(None, *args, **kwargs)
    except TypeError:
        return {}
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    return found


def unknown(cls: type, hparams: Mapping[str, Any]) -> list[str]:
    """Return the recorded names that the constructor of ``cls`` does not take."""
    parameters = _signature(cls).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return []
    known = {parameter.name for parameter in parameters}
    return [name for name in hparams if name not in known]


def construct(cls: type[T], hparams: Mapping[str, Any]) -> T:
    """Call ``cls`` with arguments that ``record`` returned."""
    parameters = list(_signature(cls).parameters.values())[1:]
    rest = dict(hparams)
    variadic = [p.name for p in parameters if p.kind is inspect.Parameter.VAR_POSITIONAL]
    # Parameters before a filled *args can only be given by position.
    by_position = bool(variadic and rest.get(variadic[0]))
    args: list[Any] = []
    for parameter in parameters:
        only = parameter.kind is inspect.Parameter.POSITIONAL_ONLY
        if parameter.name in rest and (only or (by_position and parameter.kind in _POSITIONAL)):
            args.append(rest.pop(parameter.name))
    for name in variadic:
        args += rest.pop(name, ())
    return cls(*args, **rest)
