"""Batches of any kind: a walk over the tensors in them, and the number of samples they hold."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from loopkit.errors import DataError, LoopkitWarning

TensorFn = Callable[[Tensor], Any]
ObjectFn = Callable[[Any], Any]


def map_batch(batch: Any, tensors: TensorFn, objects: ObjectFn) -> Any:
    """Return a batch of the same kind, with every tensor and every movable object replaced.

    Dicts, their subclasses, lists, tuples, named tuples and dataclasses are walked through, and
    copied; frozen dataclasses too. The ``batch_sizes`` of a PackedSequence stay as they are, since
    torch needs them on the CPU. Everything else stays as it is.

    Args:
        batch: the batch.
        tensors: makes the new tensor of each tensor.
        objects: makes the new object of each object that has ``.to`` and is none of the above.
    """
    if isinstance(batch, Tensor):
        return tensors(batch)
    kind = type(batch)
    if kind is tuple or kind is list:
        return kind([map_batch(part, tensors, objects) for part in batch])
    if kind is dict:
        return {key: map_batch(part, tensors, objects) for key, part in batch.items()}
    if isinstance(batch, PackedSequence):
        indices = (batch.sorted_indices, batch.unsorted_indices)
        moved = (None if index is None else tensors(index) for index in indices)
        return kind(tensors(batch.data), batch.batch_sizes, *moved)
    if is_movable(batch):
        return objects(batch)
    if isinstance(batch, tuple):
        parts = [map_batch(part, tensors, objects) for part in batch]
        return kind._make(parts) if hasattr(kind, "_make") else kind(parts)
    if isinstance(batch, (list, MutableMapping)):
        return _with_items(batch, tensors, objects)
    if isinstance(batch, Mapping):
        return kind({key: map_batch(part, tensors, objects) for key, part in batch.items()})
    if is_dataclass(batch) and not isinstance(batch, type):
        return _with_fields(batch, tensors, objects)
    return batch


def _with_items(batch: Any, tensors: TensorFn, objects: ObjectFn) -> Any:
    # A copy keeps what a subclass holds besides its items.
    made = copy.copy(batch)
    for key in range(len(batch)) if isinstance(batch, list) else list(batch):
        made[key] = map_batch(batch[key], tensors, objects)
    return made


def _with_fields(batch: Any, tensors: TensorFn, objects: ObjectFn) -> Any:
    made = copy.copy(batch)
    for field in fields(batch):
        if hasattr(batch, field.name):
            value = map_batch(getattr(batch, field.name), tensors, objects)
            object.__setattr__(made, field.name, value)  # works for frozen ones too
    return made


def is_movable(batch: Any) -> bool:
    """Return whether a batch is an object that moves itself: a graph, a TensorDict, an image list.

    A dict subclass with plain items is walked through instead, although transformers' BatchEncoding
    has ``.to``: its tensors can then be cast one by one.
    """
    kind = type(batch)
    if isinstance(batch, (Tensor, type, nn.Module, list, tuple)):
        return False
    plain = isinstance(batch, Mapping) and not hasattr(kind, "batch_size")
    return callable(getattr(kind, "to", None)) and not plain


def cast_object(batch: Any, cast: TensorFn) -> Any:
    """Return a movable object with its tensors cast: by its own ``apply``, else by attribute.

    torch_geometric and tensordict call a walk over their tensors ``apply``.

    Raises:
        DataError: no tensor of the object can be reached.
    """
    made = copy.copy(batch)
    if callable(_attribute(made, "apply")):
        return made.apply(cast)
    kept = getattr(made, "__dict__", {})
    if is_dataclass(made):
        kept = {f.name: getattr(made, f.name) for f in fields(made) if hasattr(made, f.name)}
    found: list[Tensor] = []

    def seen(tensor: Tensor) -> Any:
        found.append(tensor)
        return cast(tensor)

    for name, value in list(kept.items()):
        changed = map_batch(value, seen, lambda part: cast_object(part, seen))
        object.__setattr__(made, name, changed)
    if not found:
        raise DataError(
            f"this precision needs the batch's tensors in another type, and those of a "
            f"{type(batch).__name__} cannot be reached: give it a method apply(function) that "
            "returns it with the function applied to each tensor, or take precision='bf16'"
        )
    return made


class SampleCounter:
    """Counts the samples in batches that a user's iterable makes.

    Args:
        own: the task's ``count_samples``, where it defines one; None reads the number off.
        what: what returned the data, such as ``Digits.train_data()``, for messages.

    Attributes:
        count: returns the number of samples in a batch; None where it cannot be read off.
    """

    def __init__(self, own: Callable[[Any], Any] | None, what: str) -> None:
        self.count: Callable[[Any], int | None] = sample_count if own is None else self._ask
        self._own = own
        self._what = what
        self._checked = own is not None

    def check(self, batch: Any) -> None:
        """Report a first batch whose tensors disagree on how many samples there are."""
        sizes = [] if self._checked else list(dict.fromkeys(_leading_sizes(batch)))
        self._checked = True
        if len(sizes) > 1:
            shown = ", ".join(map(str, sizes[:4]))
            warnings.warn(
                f"{self._what} gave a batch whose tensors begin with different dimensions, {shown}: "
                f"the first is taken as the number of samples. {_HOW_TO_SAY}",
                LoopkitWarning,
                stacklevel=2,
            )

    def unknown(self, batch: Any) -> DataError:
        """Return the error for a batch whose number of samples cannot be read off."""
        return DataError(
            f"{self._what} gave a batch of the type {type(batch).__name__}, and its number of "
            f"samples cannot be read off. {_HOW_TO_SAY}"
        )

    def _ask(self, batch: Any) -> int:
        assert self._own is not None
        size = self._own(batch)
        if isinstance(size, Tensor) and size.numel() == 1:
            size = size.item()
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 0:
            raise DataError(
                f"count_samples returned {size!r} for a batch of {self._what}: return a whole "
                "number of samples, 0 or more"
            )
        return int(size)


_HOW_TO_SAY = (
    "Losses are weighted by it, so define it on the task, for example: "
    "def count_samples(self, batch): return len(batch[0])"
)


def sample_count(batch: Any) -> int | None:
    """Return the number of samples in a batch; None where it cannot be read off.

    That is, in this order: a ``num_graphs`` or ``batch_size`` of its own; the sequences of a
    PackedSequence; the leading dimension of the first tensor or array; the length of a list of
    other values, or of the first such list in it. A plain value, such as a string, a number or a
    tensor without dimensions, is one sample.
    """
    if isinstance(batch, Tensor):
        return batch.size(0) if batch.ndim else 1
    first = batch[0] if isinstance(batch, (list, tuple)) and batch else None
    if isinstance(first, Tensor) and first.ndim and not isinstance(batch, PackedSequence):
        return first.size(0)
    for size in _leading_sizes(batch):
        return size
    if isinstance(batch, Mapping):
        batch = next(iter(batch.values()), ())
    if isinstance(batch, (list, tuple)):
        return len(batch)
    return 1 if batch is None or isinstance(batch, _PLAIN) or _is_array(batch) else None


_PLAIN = (str, bytes, int, float, complex, np.generic, Tensor)


def _is_array(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _own_size(batch: Any) -> int | None:
    """Return the size that an object of no plain kind gives itself."""
    if type(batch) in (dict, list, tuple) or isinstance(batch, (Tensor, np.ndarray, *_PLAIN)):
        return None
    for name in ("num_graphs", "batch_size"):
        size = _attribute(batch, name)
        if isinstance(size, Sequence) and size:  # tensordict's batch_size is a torch.Size
            size = size[0]
        if isinstance(size, int) and not isinstance(size, bool):
            return size
    return None


def _attribute(batch: Any, name: str) -> Any:
    """Return an attribute of an object; None without it, also where a dict takes it for a key."""
    if not hasattr(type(batch), name) and name not in getattr(batch, "__dict__", ()):
        return None
    try:
        return getattr(batch, name)
    except Exception:
        return None  # a property of a batch that is not complete


def _leading_sizes(batch: Any) -> Iterator[int]:
    """Yield the samples that each part of a batch seems to hold, depth first."""
    if _is_array(batch):
        if batch.ndim:
            yield len(batch)
        return
    if isinstance(batch, PackedSequence):
        yield int(batch.batch_sizes[0])
        return
    size = _own_size(batch)
    if size is not None:
        yield size
        return
    if isinstance(batch, Mapping):
        parts: Any = batch.values()
    elif isinstance(batch, (list, tuple)):
        parts = batch
    elif is_dataclass(batch) and not isinstance(batch, type):
        parts = (getattr(batch, field.name, None) for field in fields(batch))
    else:
        return
    for part in parts:
        yield from _leading_sizes(part)
