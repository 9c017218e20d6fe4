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


def token_count(batch: Any) -> int:
    """Return the number of tokens in a batch: the elements of ``input_ids``; 0 without them."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids.numel() if isinstance(ids, Tensor) else 0
