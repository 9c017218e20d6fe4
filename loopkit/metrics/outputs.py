"""Outputs of the batches of a pass, joined to those of all samples in the order of the data."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from loopkit.errors import TaskError
from loopkit.metrics.arrays import (
    concatenate,
    padded_rows,
    plain_tensor,
    stack,
    to_array,
    unsqueezed,
)


class BatchOutput(NamedTuple):
    """What a step returned for one batch, on the CPU, and the number of samples in the batch."""

    value: Any
    size: int


def on_cpu(value: Any) -> Any:
    """Return ``value`` with its tensors detached and dense on the CPU, inside dataclasses too."""
    if isinstance(value, Tensor):
        return plain_tensor(value.detach().cpu())
    fields = named_parts(value)
    if fields is not None:
        return _rebuilt(value, {name: on_cpu(part) for name, part in fields.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(part) for part in value)
    return value


def join_outputs(parts: list[BatchOutput], step: str, *, arrays: bool = False) -> Any:
    """Return the outputs of all batches as one, in their order.

    - Tensors and NumPy arrays are concatenated along dimension 0. Where other dimensions differ,
      they are padded to the largest, with -100, or with False. Unsigned integers become signed.
    - A list has an entry for each sample, and lists are chained. So are tuples of as many entries
      as samples, as ``tuple(zip(*batch))`` gives them.
    - Mappings, dataclasses, named tuples and other tuples keep their form.
    - Everything else, such as a number for the whole batch, becomes a list of one for each batch.

    Args:
        parts: the outputs of the batches; none give an empty list.
        step: the name of the step that returned them, for messages.
        arrays: True for NumPy arrays in place of tensors.

    Raises:
        TaskError: outputs of two batches have different forms, or a part of one has another length
            than its batch.
    """
    if not parts:
        return []
    joiner = _Joiner(step, [part.size for part in parts], arrays=arrays)
    joined = joiner.join([part.value for part in parts], "")
    joiner.check_lengths()
    return joined


def check_outputs(
    first: BatchOutput, other: BatchOutput, numbers: tuple[int, int], step: str
) -> None:
    """Compare the outputs of two batches, so that an error comes at once, not after the last batch.

    Args:
        first: the outputs of a batch.
        other: those of a later one, or ``first`` again.
        numbers: the numbers of the two batches in the data.
        step: the name of the step that returned them.

    Raises:
        TaskError: they cannot be joined.
    """
    joiner = _Joiner(step, [first.size, other.size], numbers=numbers)
    joiner.join([first.value, other.value], "")
    joiner.check_lengths()


def entries_by_sample(part: BatchOutput) -> Any:
    """Return the output of one batch, as a list where it is a tuple with an entry per sample."""
    value, size = part
    if type(value) is tuple and len(value) == size:
        by_dict = all(isinstance(entry, Mapping) for entry in value)
        if by_dict or not all(_fits(entry, size) for entry in value):
            return list(value)
    return value


class _Joiner:
    """Joins the outputs of batches; ``numbers`` None joins them all, else two are compared."""

    def __init__(
        self,
        step: str,
        sizes: list[int],
        *,
        arrays: bool = False,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._step = step
        self._sizes = sizes
        self._arrays = arrays
        self._numbers = numbers or range(len(sizes))
        self._compares = numbers is not None
        self._lengths: list[dict[str, int]] = [{} for _ in sizes]

    def join(self, values: list[Any], path: str) -> Any:
        kind = self._same(values, path, _kind)
        if kind == "array":
            return self._tensors(values, path)
        if kind == "dict":
            return self._mappings(values, path)
        if kind == "list":
            return self._lists(values, path)
        if kind == "tuple":
            return self._tuples(values, path)
        return None if kind == "None" else values

    def check_lengths(self) -> None:
        """Compare the lengths of the parts of each batch with its number of samples.

        All parts may have another length together: the tokens of a batch, or the samples kept.
        """
        for index, (lengths, size) in enumerate(zip(self._lengths, self._sizes)):
            others = {path: length for path, length in lengths.items() if length != size}
            if others and (len(set(others.values())) > 1 or len(others) == 1):
                path, length = next(iter(others.items()))
                self._fail(
                    path,
                    f"has {length} entries in batch {self._numbers[index]}, which has {size} "
                    "sample(s). Return one entry for each sample: squeeze() may have dropped a "
                    "dimension, and a list holds what has another length for each sample. Where "
                    "loopkit counts the samples wrong, define count_samples(batch) on the task",
                )

    def _mappings(self, values: list[Any], path: str) -> Any:
        fields = [named_parts(value) or {} for value in values]
        for index, found in enumerate(fields):
            other = next((i for i, keys in enumerate(fields) if keys.keys() - found.keys()), None)
            if other is not None:
                key = next(key for key in fields[other] if key not in found)
                self._fail(
                    _below(path, key),
                    f"is in batch {self._numbers[other]} and not in batch {self._numbers[index]}: "
                    "return the same keys for every batch",
                )
        joined = {
            key: self.join([part[key] for part in fields], _below(path, key)) for key in fields[0]
        }
        return None if self._compares else _rebuilt(values[0], joined)

    def _lists(self, values: list[Any], path: str) -> Any:
        by_sample = all(len(value) == size for value, size in zip(values, self._sizes))
        if not by_sample and self._are_parts(values, _fits):
            return list(self._parts(values, path))
        self._note_lengths(path, [len(value) for value in values])
        return [entry for value in values for entry in value]

    def _tuples(self, values: list[Any], path: str) -> Any:
        by_sample = all(len(value) == size for value, size in zip(values, self._sizes))
        parts = self._are_parts(values, _fits)
        if by_sample and parts and _all_mappings(values):
            if self._compares:
                return None
            self._fail(
                path,
                "may be read in two ways: as one entry for each sample, or as parts that each have "
                "all samples. Return a list for the first, a dict for the second",
            )
        if parts or (not by_sample and self._are_parts(values, lambda entry, size: True)):
            return self._parts(values, path)
        if not by_sample:
            index = next(i for i, v in enumerate(values) if len(v) != self._sizes[i])
            self._fail(
                path,
                f"is a tuple of {len(values[index])} in batch {self._numbers[index]}, which has "
                f"{self._sizes[index]} sample(s), and of another length in other batches: return "
                "a list with an entry for each sample",
            )
        return [entry for value in values for entry in value]

    def _are_parts(self, values: list[Any], fits: Callable[[Any, int], bool]) -> bool:
        """Return whether each entry has all samples of its batch, as those of a structure do."""
        return len({len(value) for value in values}) == 1 and all(
            fits(entry, size) for value, size in zip(values, self._sizes) for entry in value
        )

    def _parts(self, values: list[Any], path: str) -> tuple[Any, ...]:
        columns = enumerate(zip(*values))
        return tuple(self.join(list(column), _below(path, i)) for i, column in columns)

    def _tensors(self, values: list[Any], path: str) -> Any:
        as_arrays = self._arrays or not any(isinstance(value, Tensor) for value in values)
        arrays = [to_array(value) if as_arrays else torch.as_tensor(value) for value in values]
        ndim = max(array.ndim for array in arrays)
        if not ndim:
            return None if self._compares else stack(arrays)
        full = next(array for array in arrays if array.ndim == ndim)
        arrays = [unsqueezed(array, full, size) for array, size in zip(arrays, self._sizes)]
        self._same(arrays, path, lambda array: array.ndim)
        self._note_lengths(path, [len(array) for array in arrays])
        return None if self._compares else self._concatenated(arrays, path)

    def _concatenated(self, arrays: list[Any], path: str) -> Any:
        shape = [max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays))]
        if all(list(array.shape[1:]) == shape for array in arrays):
            return concatenate(arrays)
        try:
            return concatenate([padded_rows(array, shape) for array in arrays])
        except TypeError as error:
            self._fail(
                path,
                f"has rows of different shapes, and -100 cannot pad {error}: return it in a "
                "signed type, or a list with an entry for each sample",
            )

    def _note_lengths(self, path: str, lengths: list[int]) -> None:
        for found, length in zip(self._lengths, lengths):
            found[path] = length

    def _same(self, values: list[Any], path: str, what: Callable[[Any], Any]) -> Any:
        """Return what is the same of all values.

        Raises:
            TaskError: it is not the same.
        """
        found = [what(value) for value in values]
        other = next((index for index, each in enumerate(found) if each != found[0]), None)
        if other is not None:
            here, there = _described(values[0]), _described(values[other])
            self._fail(
                path,
                f"is {here} in batch {self._numbers[0]} and {there} in batch "
                f"{self._numbers[other]}: return the same form for every batch",
            )
        return found[0]

    def _fail(self, path: str, problem: str) -> NoReturn:
        what = f"{path!r} of what {self._step} returned" if path else f"what {self._step} returned"
        raise TaskError(f"{what} {problem}")


def _kind(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return "array"
    if named_parts(value) is not None:
        return "dict"
    if isinstance(value, (list, tuple)):
        return "list" if isinstance(value, list) else "tuple"
    return "None" if value is None else "value"


def _fits(value: Any, size: int) -> bool:
    """Return whether ``value`` holds all of a batch's samples, rather than one of them."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0 and len(value) == size
    fields = named_parts(value)
    if fields is not None:
        return bool(fields) and all(_fits(part, size) for part in fields.values())
    if isinstance(value, (list, tuple)):
        if len(value) == size:
            return True
        return len(value) > 0 and all(_fits(part, size) for part in value)
    return value is None


def _all_mappings(values: list[Any]) -> bool:
    return all(isinstance(entry, Mapping) for value in values for entry in value)


def named_parts(value: Any) -> dict[Any, Any] | None:
    """Return the named parts of a mapping, a dataclass or a named tuple; None of other values."""
    if isinstance(value, Mapping):
        return dict(value)  # a ModelOutput's own items leave out what is None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value))
    return None


def _rebuilt(value: Any, fields: dict[Any, Any]) -> Any:
    """Return ``value`` with other parts; a dict for a mapping that is no dataclass."""
    if isinstance(value, tuple):
        return type(value)(*fields.values())
    if not dataclasses.is_dataclass(value):
        return fields
    new = copy.copy(value)
    for name, part in fields.items():
        if isinstance(value, Mapping):
            new[name] = part
        else:
            object.__setattr__(new, name, part)  # also where it is frozen
    return new


def _described(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def _below(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)
