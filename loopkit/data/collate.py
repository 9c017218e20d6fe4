"""Padded: a collate function for samples of different lengths."""

from __future__ import annotations

from collections.abc import Mapping
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
        side: the side of the padding, "right" or "left".

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
        side: Literal["right", "left"] = "right",
    ) -> None:
        self.values = dict(values or {})
        self.mask = mask
        self.mask_of = mask_of
        self.multiple_of = checked_int(multiple_of, "Padded(multiple_of=)")
        self.side = checked_choice(side, "Padded(side=)", ("right", "left"))

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
            if self.side == "right":
                row[: len(part)] = part
            else:
                row[longest - len(part) :] = part
        return padded


def _as_tensor(value: Any) -> Any:
    numbers = isinstance(value, (list, tuple)) and value and isinstance(value[0], (int, float))
    return torch.as_tensor(value) if numbers or isinstance(value, np.ndarray) else value
