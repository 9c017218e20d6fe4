"""Padded: a collate function for samples of different lengths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from loopkit.errors import DataError, OptionError
from loopkit.keywords import checks_keywords


@checks_keywords
class Padded:
    """Joins samples (dicts) into a batch, sequences padded to the longest among them.

    Args:
        values: what to pad with, by key: ``{"labels": -100}``; 0 elsewhere.
        mask: the key under which to add a [batch, time] mask, 1 for tokens and 0 for padding, made
            from the lengths of ``mask_of``; None adds none, as does a sample that brings its own.
        mask_of: the key whose lengths the mask tells.
        multiple_of: pad to a multiple of this, as matrix units like.
        side: where the padding goes.
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
        if multiple_of < 1 or side not in ("right", "left"):
            raise OptionError(
                f"Padded(multiple_of={multiple_of}, side={side!r}): at least 1, and 'right' or "
                f"'left'"
            )
        self.values = dict(values or {})
        self.mask = mask
        self.mask_of = mask_of
        self.multiple_of = multiple_of
        self.side = side

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch: [batch, longest, ...] for sequences, [batch, ...] for the rest.

        Raises:
            DataError: a sample is no dict, or lacks a key that another has.
        """
        first = samples[0]
        for sample in samples:
            if not isinstance(sample, Mapping) or sample.keys() != first.keys():
                keys = sorted(sample) if isinstance(sample, Mapping) else type(sample).__name__
                raise DataError(
                    f"samples to pad must be dicts with the same keys: one has {sorted(first)}, "
                    f"one {keys}"
                )
        batch: dict[str, Any] = {}
        for key in first:
            column = [_tensor(sample[key]) for sample in samples]
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
        out = column[0].new_full((len(column), longest, *column[0].shape[1:]), value)
        for row, part in zip(out, column):
            if self.side == "right":
                row[: len(part)] = part
            else:
                row[longest - len(part) :] = part
        return out


def _tensor(value: Any) -> Any:
    numbers = isinstance(value, (list, tuple)) and value and isinstance(value[0], (int, float))
    return torch.as_tensor(value) if numbers or isinstance(value, np.ndarray) else value
