"""Values as loggers can store them: JSON values, flat tables of hyperparameters, numbers, arrays."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

_MOST_CHARACTERS = 200
_MOST_ELEMENTS = 10_000
_MOST_LEVELS = 30
_MOST_BITS = 10_000


def jsonable(value: Any, *, depth: int = 0) -> Any:
    """Return ``value`` as strict JSON can hold it, whatever it is.

    NaN and infinities become strings, functions and classes their full name, and other objects
    their repr. Containers and arrays of more than 10,000 elements become a description, and so do
    objects that cannot be read, and containers more than 30 levels deep.

    Args:
        depth: how many containers ``value`` is within.
    """
    try:
        if depth > _MOST_LEVELS:
            return f"{type(value).__name__} …"
        return _jsonable(value, depth + 1)
    except Exception:
        shape = getattr(value, "shape", None)
        of = f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""
        return f"{type(value).__name__}{of}"


def _jsonable(value: Any, depth: int) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        # Python refuses to print longer ones.
        long = value.bit_length() > _MOST_BITS
        return f"int of {value.bit_length()} bits" if long else value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): jsonable(part, depth=depth) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        if len(value) > _MOST_ELEMENTS:
            return f"{type(value).__name__} of {len(value)}"
        return [jsonable(part, depth=depth) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "tolist", None)) and hasattr(value, "dtype"):
        if math.prod(value.shape) > _MOST_ELEMENTS:
            return f"{type(value).__name__} of shape {tuple(value.shape)}"
        plain = value.tolist()
        if type(plain) is type(value):
            # Python has no number for NumPy's long double, which is its own plain value.
            plain = complex(value) if np.iscomplexobj(value) else float(value)
        return jsonable(plain, depth=depth)
    return _described(value)


def _described(value: Any) -> str:
    """Return the name of a function or a class, or else the repr if it says anything."""
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # The default repr is an address. That of a dataclass of tensors takes seconds to print.
    has_repr = any("__repr__" in vars(kind) for kind in type(value).__mro__[:-1])
    if not has_repr or hasattr(value, "__dataclass_fields__"):
        return type(value).__name__
    text = repr(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


def flatten(
    values: Mapping[str, Any], prefix: str = "", *, depth: int = 0
) -> dict[str, bool | int | float | str]:
    """Return nested hyperparameters under one name each, such as ``optimizer/lr``.

    Values that are no scalars become strings.
    """
    found: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and depth < _MOST_LEVELS:
            found |= flatten(value, f"{prefix}{name}/", depth=depth + 1)
            continue
        value = jsonable(value)
        is_scalar = isinstance(value, (bool, int, float, str))
        found[f"{prefix}{name}"] = value if is_scalar else str(value)
    return found


def to_float(value: float) -> float:
    """Return ``value`` as a float; an int that is too large becomes an infinity."""
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def to_array(value: Any) -> Any:
    """Return an array or a tensor as a float64 array on the CPU; None if it holds no numbers."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().to("cpu").double().numpy()
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
