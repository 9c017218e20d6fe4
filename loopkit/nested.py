"""Walks through nested values: batches, outputs and settings of dicts, lists, tuples and leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def map_instances(kind: type[Any], function: Callable[[Any], Any], value: Any) -> Any:
    """Return ``value`` with ``function`` applied to every instance of ``kind`` in it.

    Dicts become plain dicts; lists, tuples and other mappings keep their type, which builds itself
    from a list or a dict. All other leaves stay as they are.
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, PackedSequence):
        return _map_packed(kind, function, value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_instances(kind, function, part) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_instances(kind, function, part) for part in value)
    if isinstance(value, dict):
        return {key: map_instances(kind, function, part) for key, part in value.items()}
    if isinstance(value, Mapping):
        # transformers' BatchEncoding and the like.
        parts = {key: map_instances(kind, function, part) for key, part in value.items()}
        return type(value)(parts)  # type: ignore[call-arg]
    return value


def _map_packed(kind: type[Any], function: Callable[[Any], Any], value: PackedSequence) -> Any:
    # torch needs the batch sizes as they are, on the CPU.
    data, sizes, *indices = value
    mapped = (map_instances(kind, function, part) for part in indices)
    return type(value)(map_instances(kind, function, data), sizes, *mapped)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Return ``value`` with ``function`` applied to every tensor in it."""
    return map_instances(Tensor, function, value)


def to_cpu(value: Any) -> Any:
    """Return ``value`` with its tensors detached, on the CPU."""
    return map_instances(Tensor, _detached, value)


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


def leaves(value: Any) -> Iterator[Any]:
    """Yield all that is no mapping, list or tuple in ``value``, depth first."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for part in value:
        yield from leaves(part)


def named_leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all that is no mapping in ``value`` with its keys, joined by "/", behind ``name``."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, part in value.items():
        yield from named_leaves(part, f"{name}/{key}" if name else str(key))


def concatenate(parts: list[Any], tensors: Callable[[list[Tensor]], Any]) -> Any:
    """Return the outputs of several batches as one.

    Dicts and tuples keep their form, lists are chained, other values stay a list of one per batch.

    Args:
        parts: at least one output; all have the same structure.
        tensors: concatenates the tensors at one place of the structure.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        return tensors(parts)
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in parts], tensors) for key in first}
    if isinstance(first, tuple):
        joined = [concatenate(list(column), tensors) for column in zip(*parts)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    return parts


def token_count(batch: Any) -> int:
    """Return the number of tokens in a batch: the elements of ``input_ids``; 0 without them."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, Tensor) else 0
