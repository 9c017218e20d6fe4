"""Padded: a collate function for samples of different lengths."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from loopkit.checks import checked_choice, checked_int
from loopkit.data.worker_transfer import worker_transfer
from loopkit.errors import DataError, LoopkitWarning
from loopkit.keywords import checks_keywords


@checks_keywords
class Padded:
    """Makes a batch of samples that are dicts. Sequences are padded to the longest of the batch.

    Example::

        Loader(texts, collate_fn=Padded({"labels": -100}, multiple_of=8))

    Args:
        values: the padding value by key, such as ``{"labels": -100}``; 0 for other keys.
        mask: the key of a mask to add, [batch, time], 1 for tokens and 0 for padding. None adds
            none. Samples that hold the key keep their own.
        mask_of: the key whose lengths make the mask.
        multiple_of: pads to a multiple of this number; matrix units are faster with some.
        padding_side: where the padding goes, "right" or "left", as for transformers' tokenizers.

    Raises:
        OptionError: an unknown argument, or a value that is not accepted.
    """

    def __init__(
        self,
        values: Mapping[str, float] | None = None,
        *,
        mask: str | None = "attention_mask",
        mask_of: str = "input_ids",
        multiple_of: int = 1,
        padding_side: Literal["right", "left"] = "right",
    ) -> None:
        self.values = dict(values or {})
        self.mask = mask
        self.mask_of = mask_of
        self.multiple_of = checked_int(multiple_of, "Padded(multiple_of=)")
        self.padding_side = checked_choice(padding_side, "Padded(padding_side=)", ("right", "left"))

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch: [batch, longest, ...] for sequences, [batch, ...] for other values.

        Raises:
            DataError: a sample is not a dict, or lacks a key of another sample.
        """
        first = samples[0]
        for sample in samples:
            if not isinstance(sample, Mapping) or sample.keys() != first.keys():
                keys = sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__
                raise DataError(
                    f"samples to pad must be dicts with the same keys: one has {sorted(first)}, "
                    f"another {keys}"
                )
        batch: dict[str, Any] = {}
        for key in first:
            column = [_as_tensor(sample[key]) for sample in samples]
            if all(isinstance(value, Tensor) and value.ndim for value in column):
                batch[key] = self._pad(column, self.values.get(key, 0))
            else:
                batch[key] = default_collate([sample[key] for sample in samples])
        if self.mask and self.mask not in first and self.mask_of in first:
            ones = [torch.ones(len(sample[self.mask_of]), dtype=torch.long) for sample in samples]
            batch[self.mask] = self._pad(ones, 0)
        return batch

    def _pad(self, column: list[Tensor], value: float) -> Tensor:
        longest = max(len(part) for part in column)
        longest = -(-longest // self.multiple_of) * self.multiple_of
        padded = column[0].new_full((len(column), longest, *column[0].shape[1:]), value)
        for row, part in zip(padded, column):
            if self.padding_side == "right":
                row[: len(part)] = part
            else:
                row[longest - len(part) :] = part
        return padded


def _as_tensor(value: Any) -> Any:
    numbers = isinstance(value, (list, tuple)) and value and isinstance(value[0], (int, float))
    return torch.as_tensor(value) if numbers or isinstance(value, np.ndarray) else value


class StreamCollate:
    """The collate function for samples of an IterableDataset; its errors name the sample.

    It reports samples that look like batches: all their tensors begin with the batch size.

    Args:
        collate: makes a batch of a list of samples.
        dataset: the name of the data set's class.
        batch_size: samples per batch.
        num_workers: how many processes collate.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Any],
        dataset: str,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self.collate = collate
        self.dataset = dataset
        self.batch_size = batch_size
        self._transfer = worker_transfer(num_workers)
        self._looked = False

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch.

        Raises:
            DataError: no batch could be made of the samples.
        """
        if not self._looked:
            self._looked = True
            if len(samples) == self.batch_size > 1 and all(map(self._is_batch, samples)):
                warnings.warn(
                    f"{self.dataset} yields tensors that begin with {self.batch_size}, which is "
                    f"the batch size, and {self.batch_size} of them are stacked into a batch. "
                    f"{YIELDS_BATCHES}",
                    LoopkitWarning,
                    stacklevel=2,
                )
        try:
            batch = self.collate(samples)
        except Exception as error:
            names = [f"sample {number} of them" for number in range(len(samples))]
            where = f"{len(samples)} samples in a row of {self.dataset}"
            raise DataError(
                f"{collate_problem(error, samples, names, where)} {YIELDS_BATCHES}"
            ) from error
        return self._transfer(batch)

    def _is_batch(self, sample: Any) -> bool:
        parts = list(sample.values()) if isinstance(sample, Mapping) else sample
        if not isinstance(parts, (list, tuple)):
            return False
        tensors = [part for part in parts if isinstance(part, Tensor)]
        return len(tensors) > 1 and all(
            part.ndim and len(part) == self.batch_size for part in tensors
        )


YIELDS_BATCHES = "If it yields batches already, return DataLoader(dataset, batch_size=None), which is read as it is"


def collate_error(
    error: Exception,
    dataset: str,
    samples: Sequence[Any],
    indices: Iterable[Any],
    epoch: int,
) -> DataError:
    """Return the error for samples of which the collate function could make no batch.

    Args:
        error: what the collate function raised.
        dataset: the name of the data set's class.
        samples: the samples of the batch.
        indices: their indices in the data set.
    """
    numbers = [int(index) for index in indices]
    shown = ", ".join(map(str, numbers[:8])) + (" …" if len(numbers) > 8 else "")
    names = [f"{dataset}[{number}]" for number in numbers]
    where = f"the samples {shown} of {dataset} in epoch {epoch}"
    return DataError(collate_problem(error, samples, names, where))


def collate_problem(
    error: Exception, samples: Sequence[Any], names: Sequence[str], where: str
) -> str:
    """Say why no batch could be made of samples, and which of them is unlike the others.

    Args:
        error: what the collate function raised.
        samples: the samples of the batch.
        names: the name of each.
        where: all of them in words.
    """
    # Where a collate function pads, other lengths mean nothing. torch raises RuntimeError for them.
    looks = (_kind_of, _keys_of, _shapes_of)[: 3 if isinstance(error, RuntimeError) else 2]
    found = ""
    for described in looks:
        each = [described(sample) for sample in samples]
        common = Counter(each).most_common(1)[0][0]
        odd = "is None" if "is None" in each else next((t for t in each if t != common), None)
        if odd is not None:
            found = f" {names[each.index(odd)]} {odd}"
            if odd != common:
                found += f", where {names[each.index(common)]} {common}"
            found += "."
            break
    said = f"{type(error).__name__}: {error}".rstrip(".")
    return f"no batch could be made of {where}.{found} The collate function says: {said}."


def _kind_of(sample: Any) -> str:
    return "is None" if sample is None else f"is a {type(sample).__name__}"


def _keys_of(sample: Any) -> str:
    if isinstance(sample, Mapping):
        return f"has the keys {', '.join(sorted(map(str, sample)))}"
    return f"has {len(sample)} parts" if isinstance(sample, (list, tuple)) else "is one value"


def _shapes_of(sample: Any) -> str:
    parts: Iterable[tuple[Any, Any]] = [("", sample)]
    if isinstance(sample, Mapping):
        parts = sample.items()
    elif isinstance(sample, (list, tuple)):
        parts = enumerate(sample)
    shapes = [f"{name} {_shape(value)}".strip() for name, value in parts]
    return f"has {', '.join(shapes)}"


def _shape(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"of shape {list(shape)}"
    return f"of length {len(value)}" if isinstance(value, (list, tuple)) else type(value).__name__
