"""Python values to JSON and back, exactly, without pickle and without calling what a file names.

These types are restored as they were: ``None``, ``bool``, ``int``, ``float`` (NaN with its bits,
infinities, -0.0), ``complex``, ``str``, ``bytes``, ``list``, ``tuple``, ``dict`` (any keys, in
order), ``OrderedDict``, ``Counter``, ``deque``, ``set``, ``frozenset``, ``range``, ``torch.Size``,
``torch.dtype``, ``torch.device``, tensors (a ``Parameter`` is restored as a plain tensor; all are
restored on the CPU, without gradient), numpy scalars and arrays of numbers and times (C order),
paths, ``datetime``, ``date``, ``timedelta`` and fixed-offset ``timezone``. Any other type,
subclasses included, is a ``TypeError`` that names the path of the value.

A tagged value is an object with one key that begins with ``$``. A user's dict with such a key, or
with keys that are not strings, is written as a list of pairs, so the two cannot be confused.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from loopkit.checkpoint.format import dump_json
from loopkit.checkpoint.snapshot import Shard
from loopkit.checkpoint.values import (
    FROM_JSON,
    PATHS,
    TO_JSON,
    has_no_surrogates,
    is_numeric_dtype,
    read_array,
)
from loopkit.errors import CorruptCheckpointError

MAX_DEPTH = 100
"""The deepest nesting of containers; deeper values are refused in both directions."""


def encode(value: Any, path: str, tensors: dict[str, Any]) -> Any:
    """Return ``value`` as JSON data.

    Tensors and arrays are put into ``tensors`` under names made from ``path``. Tensors are not
    copied.

    Raises:
        TypeError: the type of a value is not in the list above; with its path.
        ValueError: values are nested deeper than :data:`MAX_DEPTH`.
    """
    return _Encoder(tensors).value(value, path, 0)


def decode(data: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the value that :func:`encode` was given; its tensors are popped from ``tensors``.

    Raises:
        CorruptCheckpointError: :func:`encode` does not write such data; with its path.
    """
    return _Decoder(tensors).value(data, path, 0)


class _Encoder:
    def __init__(self, tensors: dict[str, Any]):
        self.tensors = tensors

    def value(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(
                f"{path[:80]}…: nested more than {MAX_DEPTH} deep; does a container hold itself?"
            )
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind in TO_JSON:
            try:
                return TO_JSON[kind](value)
            except TypeError as error:
                raise TypeError(f"{path}: {error}") from None
        if kind is dict:
            return self.mapping(value, path, depth)
        if kind in _SEQUENCES:
            items = [
                self.value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value)
            ]
            return _SEQUENCES[kind](value, items)
        if kind is OrderedDict or kind is Counter:
            return {f"${kind.__name__}": self.pairs(value, path, depth)}
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            return {"$tensor": self.keep(path, value.detach())}
        if kind is Shard:
            return {"$tensor": self.keep(path, value)}
        if isinstance(value, np.generic | np.ndarray):
            return self.numpy(value, path)
        raise TypeError(
            f"{path}: a {kind.__module__}.{kind.__qualname__} cannot be saved in a checkpoint. "
            "Save what rebuilds it: numbers, strings, tensors, lists and dicts of them."
        )

    def mapping(self, value: dict[Any, Any], path: str, depth: int) -> Any:
        if all(_is_plain_key(key) for key in value):
            return {
                key: self.value(item, _join(path, key), depth + 1) for key, item in value.items()
            }
        return {"$dict": self.pairs(value, path, depth)}

    def pairs(self, value: Mapping[Any, Any], path: str, depth: int) -> list[Any]:
        return [
            [
                self.value(key, f"{_join(path, key)} (key)", depth + 1),
                self.value(item, _join(path, key), depth + 1),
            ]
            for key, item in value.items()
        ]

    def numpy(self, value: Any, path: str) -> Any:
        known = isinstance(value, np.generic) or type(value) is np.ndarray
        if not known or not is_numeric_dtype(value.dtype.str):
            raise TypeError(
                f"{path}: a numpy {type(value).__name__} of dtype {value.dtype} cannot be saved "
                "in a checkpoint; arrays of numbers and times can. Use a list for text and objects."
            )
        if isinstance(value, np.generic):
            return {"$scalar": [value.dtype.str, value.tobytes().hex()]}
        raw = torch.empty(0, dtype=torch.uint8)
        if value.nbytes:
            # Copied, so that later changes to the array do not reach the file.
            raw = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
        return {"$array": [self.keep(path, raw), value.dtype.str, list(value.shape)]}

    def keep(self, path: str, tensor: torch.Tensor | Shard) -> str:
        """Put a tensor among the tensors and return its name, which is free."""
        name, count = path, 1
        while name in self.tensors:
            count += 1
            name = f"{path}#{count}"
        self.tensors[name] = tensor
        return name


def _is_plain_key(key: Any) -> bool:
    return type(key) is str and not key.startswith("$") and has_no_surrogates(key)


def _join(path: str, key: Any) -> str:
    name = key if type(key) is str and has_no_surrogates(key) else ascii(key)
    return f"{path}.{name}" if path else name


_SEQUENCES: dict[type, Callable[[Any, list[Any]], Any]] = {
    list: lambda v, items: items,
    tuple: lambda v, items: {"$tuple": items},
    torch.Size: lambda v, items: {"$size": items},
    deque: lambda v, items: {"$deque": [v.maxlen, *items]},
    # Sorted, because a set of strings has another order in each process.
    set: lambda v, items: {"$set": sorted(items, key=dump_json)},
    frozenset: lambda v, items: {"$frozenset": sorted(items, key=dump_json)},
}


class _Decoder:
    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def value(self, data: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise CorruptCheckpointError(f"{path[:80]}…: nested more than {MAX_DEPTH} deep")
        if type(data) is list:
            return self.items(data, path, depth)
        if type(data) is not dict:
            return data
        if not any(key.startswith("$") for key in data):
            return {
                key: self.value(item, _join(path, key), depth + 1) for key, item in data.items()
            }
        tag, body = next(iter(data.items()))
        if len(data) != 1 or tag not in _KNOWN:
            raise CorruptCheckpointError(f"{path}: unknown value {sorted(data)[:3]!a}")
        try:
            return self.tagged(tag, body, path, depth)
        except _INVALID as error:
            raise CorruptCheckpointError(f"{path}: not a {tag[1:]} ({error})") from None

    def tagged(self, tag: str, body: Any, path: str, depth: int) -> Any:
        if tag in FROM_JSON:
            return FROM_JSON[tag](body)
        if tag == "$tensor":
            return self.tensors.pop(body)
        if tag == "$array":
            return read_array(self.tensors.pop(body[0]), body[1], body[2])
        if tag == "$path":
            return PATHS[body[0]](self.value(body[1], path, depth))
        if type(body) is not list:
            raise ValueError("a list is expected")
        if tag in _FROM_PAIRS:
            return _FROM_PAIRS[tag](self.pairs(body, path, depth))
        return _FROM_ITEMS[tag](self.items(body, path, depth))

    def items(self, body: list[Any], path: str, depth: int) -> list[Any]:
        return [self.value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(body)]

    def pairs(self, body: list[Any], path: str, depth: int) -> list[tuple[Any, Any]]:
        found: list[tuple[Any, Any]] = []
        for key, item in body:
            name = self.value(key, f"{path} (key)", depth + 1)
            found.append((name, self.value(item, _join(path, name), depth + 1)))
        return found


_INVALID = (ValueError, TypeError, LookupError, OverflowError, struct.error, RuntimeError)
"""What the constructors of the types raise for data that does not fit."""


def _unique(items: Iterable[Any], build: Callable[[list[Any]], Any]) -> Any:
    """Build a container of ``items``, none of which may appear twice."""
    listed = list(items)
    result = build(listed)
    if len(result) != len(listed):
        raise ValueError("an element appears twice")
    return result


_FROM_PAIRS: dict[str, Callable[[list[tuple[Any, Any]]], Any]] = {
    "$dict": lambda pairs: _unique(pairs, dict),
    "$OrderedDict": lambda pairs: _unique(pairs, OrderedDict),
    "$Counter": lambda pairs: Counter(_unique(pairs, dict)),
}
_FROM_ITEMS: dict[str, Callable[[list[Any]], Any]] = {
    "$tuple": tuple,
    "$size": torch.Size,
    "$deque": lambda items: deque(items[1:], maxlen=items[0]),
    "$set": lambda items: _unique(items, set),
    "$frozenset": lambda items: _unique(items, frozenset),
}
_KNOWN = {*FROM_JSON, *_FROM_PAIRS, *_FROM_ITEMS, "$tensor", "$array", "$path"}
