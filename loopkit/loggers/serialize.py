"""Values as plain ones: for JSON, for the flat tables that hyperparameters go to, and for files
replaced whole.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

_LONGEST = 200
_LARGEST = 10_000


def plain(value: Any) -> Any:
    """``value`` as what strict JSON can hold; NaN and infinities as strings, objects by name or by
    their repr.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        if len(value) > _LARGEST:
            return f"{type(value).__name__} of {len(value)}"
        return [plain(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if callable(getattr(value, "tolist", None)) and hasattr(value, "dtype"):
        size = math.prod(value.shape)
        return (
            plain(value.tolist())
            if size <= _LARGEST
            else f"{type(value).__name__} of shape {tuple(value.shape)}"
        )
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    says_something = any("__repr__" in vars(kind) for kind in type(value).__mro__[:-1])
    if not says_something or hasattr(value, "__dataclass_fields__"):
        return type(
            value
        ).__name__  # an address says nothing, and a dataclass of tensors takes seconds to print
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested hyperparameters under one name each (``optimizer/lr``); what is no scalar becomes a
    string.
    """
    found: dict[str, bool | int | float | str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
            continue
        value = plain(value)
        found[f"{prefix}{name}"] = (
            value if isinstance(value, (bool, int, float, str)) else str(value)
        )
    return found


def number(value: float) -> float:
    """``value`` as a float; what is too large for one as an infinity."""
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def numbers(value: Any) -> Any:
    """An array or a tensor as float64 on the CPU; None for what holds no numbers."""
    if hasattr(value, "detach"):
        value = value.detach().to("cpu").double().numpy()
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return None
