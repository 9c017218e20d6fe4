"""Python values to JSON and back, exactly, without pickle and without calling anything a file
names.

Kept with their types: ``None``, ``bool``, ``int``, ``float`` (NaN with its bits, infinities, -0.0),
``complex``, ``str``, ``bytes``, ``list``, ``tuple``, ``dict`` (any keys, in order),
``OrderedDict``, ``Counter``, ``deque``, ``set``, ``frozenset``, ``range``, ``torch.Size``,
``torch.dtype``, ``torch.device``, tensors (a ``Parameter`` comes back as a plain tensor; all come
back on the CPU, without gradient), numpy scalars and arrays of numbers and times (C order), paths,
``datetime``, ``date``, ``timedelta`` and fixed-offset ``timezone``. Anything else, subclasses
included, is a ``TypeError`` that names where it was.

A tagged value is an object with one key that starts with ``$``; a user's own dict with such a key,
or with keys that are not strings, is written as a list of pairs, so the two cannot be confused.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from loopkit.checkpoint.format import Shard, dump_json
from loopkit.checkpoint.values import FROM_JSON, PATHS, TO_JSON, numpy_kept, plain, read_array
from loopkit.errors import CorruptCheckpointError

MAX_DEPTH = 100
"""Containers inside containers; deeper values are refused in both directions."""


def encode(value: Any, path: str, tensors: dict[str, Any]) -> Any:
    """``value`` as JSON data. Tensors and arrays are put into ``tensors`` under a name made from
    ``path``.

    Tensors are not copied. Raises ``TypeError`` naming the path for a type outside the list above,
    ``ValueError`` for nesting deeper than :data:`MAX_DEPTH` (a container that holds itself, for
    one).
    """
    return _Encoder(tensors).value(value, path, 0)


def decode(data: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """What :func:`encode` was given. The tensors that are part of it are taken out of ``tensors``.

    Raises ``CorruptCheckpointError`` naming the path for anything :func:`encode` does not write.
    """
    return _Decoder(tensors).value(data, path, 0)


class _Encoder:
    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors

    def value(self, value: Any, path: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(
                f"{path[:80]}…: nested more than {MAX_DEPTH} deep; a container that holds itself?"
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
        if all(type(key) is str and not key.startswith("$") and plain(key) for key in value):
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
        if not known or not numpy_kept(value.dtype.str):
            raise TypeError(
                f"{path}: a numpy {type(value).__name__} of dtype {value.dtype} cannot be saved in "
                f"a "
                "checkpoint; arrays of numbers and times can. Use a list for text and objects."
            )
        if isinstance(value, np.generic):
            return {"$scalar": [value.dtype.str, value.tobytes().hex()]}
        # A copy, so that what the caller does to the array next does not reach the file.
        raw = (
            torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8)
            if value.nbytes
            else torch.empty(0)
        )
        return {
            "$array": [self.keep(path, raw.to(torch.uint8)), value.dtype.str, list(value.shape)]
        }

    def keep(self, path: str, tensor: Any) -> str:
        name, count = path, 1
        while name in self.tensors:
            count += 1
            name = f"{path}#{count}"
        self.tensors[name] = tensor
        return name


def _join(path: str, key: Any) -> str:
    name = key if type(key) is str and plain(key) else ascii(key)
    return f"{path}.{name}" if path else name


_SEQUENCES: dict[type, Callable[[Any, list[Any]], Any]] = {
    list: lambda v, items: items,
    tuple: lambda v, items: {"$tuple": items},
    torch.Size: lambda v, items: {"$size": items},
    deque: lambda v, items: {"$deque": [v.maxlen, *items]},
    # Sorted, because the order of a set of strings differs from process to process.
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
        except (
            ValueError,
            TypeError,
            LookupError,
            OverflowError,
            struct.error,
            RuntimeError,
        ) as error:
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


def _unique(items: Iterable[Any], build: Callable[[list[Any]], Any]) -> Any:
    listed = list(items)
    made = build(listed)
    if len(made) != len(listed):
        raise ValueError("an element appears twice")
    return made


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
