"""Position to indices, without state: which samples a batch holds is a function of (seed, epoch,
position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from loopkit.rng import mix

# What a source gives a rank at a time: its batch, the samples in it (0 where it only stands in),
# those that all ranks have together, and the position after them.
WorkItem = tuple[Any, int, int, int]

_ALIKE_CHUNK = 50


def permutation(
    length: int, *, seed: int, epoch: int, shuffle: bool
) -> Sequence[int] | torch.Tensor:
    """The order in which ``epoch`` visits ``length`` samples: an int64 permutation, or the plain
    range.
    """
    if not shuffle:
        return range(length)
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(length, generator=generator)


def weighted_sample(weights: torch.Tensor, length: int, *, seed: int, epoch: int) -> torch.Tensor:
    """``length`` samples drawn with replacement in ``epoch``, each with a chance in proportion to
    its weight.
    """
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    ends = weights.double().cumsum(0)
    places = torch.rand(length, generator=generator, dtype=torch.float64) * ends[-1]
    return torch.searchsorted(ends, places, right=True).clamp(max=len(weights) - 1)


def group_by_length(
    indices: Sequence[int] | torch.Tensor, lengths: torch.Tensor, batch: int
) -> torch.Tensor:
    """``indices`` with samples of like length brought together, so that batches of ``batch`` need
    little padding.

    Stretches of 50 batches are sorted by falling length: across stretches the order stays random.
    The longest sample of all comes first, so that memory runs out at once or not at all.
    """
    parts = torch.split(torch.as_tensor(indices), _ALIKE_CHUNK * batch)
    stretches = [part[lengths[part].argsort(descending=True, stable=True)] for part in parts]
    heads = torch.stack([lengths[part[0]] for part in stretches])
    longest = int(heads.argmax())
    stretches[0], stretches[longest] = stretches[longest], stretches[0]
    return torch.cat(stretches)


@dataclass(frozen=True)
class Sharding:
    """How one global order is dealt out: micro-batches of ``batch_size``, in turn to each of
    ``world`` ranks.

    Rank r takes the r-th slice of every ``world`` consecutive micro-batches, so that trading ranks
    for accumulation moves no sample to another micro-batch. Nothing is padded: the last slices may
    be short or empty unless ``drop_last``.
    """

    length: int
    batch_size: int
    rank: int = 0
    world: int = 1
    drop_last: bool = False

    @cached_property
    def round_size(self) -> int:
        """Samples that all ranks together take for one micro-batch each."""
        return self.batch_size * self.world

    @cached_property
    def end(self) -> int:
        """The position at which an epoch is over, in samples."""
        return self.length - self.length % self.round_size if self.drop_last else self.length

    def rounds(self, start: int = 0) -> int:
        """How many micro-batches each rank takes from ``start`` (in samples) to the end of the
        epoch.
        """
        return -(-(self.end - start) // self.round_size) if start < self.end else 0

    def read(self, position: int) -> tuple[int, int, int]:
        """What this rank reads of the round that starts at ``position``: (low, high) in the order,
        and its size.

        A rank without a sample of its own reads the first rank's, so that all take the same number
        of steps; the size is then 0, which says that they count for nothing.
        """
        end = self.end
        low = position + self.rank * self.batch_size
        if low >= end:
            return position, min(position + self.batch_size, end), 0
        high = min(low + self.batch_size, end)
        return low, high, high - low
