"""Padded: a collate function for samples of different lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from loopkit.checks import checked_choice, checked_int
from loopkit.errors import DataError
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
    # Where a collate function pads, other lengths mean nothing. torch raises RuntimeError for them.
    looks = (_kind_of, _keys_of, _shapes_of)[: 3 if isinstance(error, RuntimeError) else 2]
    found = ""
    for described in looks:
        each = [described(sample) for sample in samples]
        common = Counter(each).most_common(1)[0][0]
        odd = "is None" if "is None" in each else next((t for t in each if t != common), None)
        if odd is not None:
            found = f" {dataset}[{numbers[each.index(odd)]}] {odd}"
            if odd != common:
                found += f", where {dataset}[{numbers[each.index(common)]}] {common}"
            found += "."
            break
    return DataError(
        f"no batch could be made of the samples {shown} of {dataset} in epoch {epoch}."
        f"{found} The collate function says: {type(error).__name__}: {error}"
    )


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
