"""The samples of each batch, as a function of seed, epoch and position, without state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from loopkit.data.shuffled_range import ShuffledRange
from loopkit.rng import mix

_MEGABATCH = 50
# From here on the order is computed where it is read: torch.randperm takes 8 bytes per sample, and
# its time before the first step.
MANY = 1 << 24
Order = Sequence[int] | torch.Tensor | ShuffledRange


class WorkItem(NamedTuple):
    """One micro-batch of a rank, and where it lies in the data.

    Attributes:
        size: the samples in ``batch``; 0 marks a dummy batch, where this rank has no data left.
        total: the samples that all ranks together have for this micro-batch.
        end: the data position after it, in the unit of the source.
    """

    batch: Any
    size: int
    total: int
    end: int


def permutation(length: int, *, seed: int, epoch: int, shuffle: bool) -> Order:
    """Return the order of ``length`` samples in ``epoch``.

    It is the range, or an int64 permutation. From 2**24 samples on, the permutation takes no memory.
    """
    if not shuffle:
        return range(length)
    if length >= MANY:
        return ShuffledRange(length, mix(seed, epoch))
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(length, generator=generator)


def weighted_sample(weights: torch.Tensor, length: int, *, seed: int, epoch: int) -> torch.Tensor:
    """Return the indices of ``length`` samples, drawn by weight and with replacement.

    Args:
        weights: [samples], in proportion to the chance of each sample.
    """
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    ends = weights.double().cumsum(0)
    drawn = torch.rand(length, generator=generator, dtype=torch.float64) * ends[-1]
    return torch.searchsorted(ends, drawn, right=True).clamp(max=len(weights) - 1)


def group_by_length(indices: Order, lengths: torch.Tensor, batch: int) -> torch.Tensor:
    """Return ``indices`` reordered so that batches hold samples of about the same length.

    Every 50 batches in a row are sorted by falling length, so the order stays random at large. The
    longest sample of all comes first: if it does not fit into memory, the first step fails.

    Args:
        lengths: [samples], the length of each sample.
        batch: samples per batch, over all ranks.
    """
    runs = torch.split(torch.as_tensor(indices[:]), _MEGABATCH * batch)
    ordered = [run[lengths[run].argsort(descending=True, stable=True)] for run in runs]
    longest = int(torch.stack([lengths[run[0]] for run in ordered]).argmax())
    ordered[0], ordered[longest] = ordered[longest], ordered[0]
    return torch.cat(ordered)


@dataclass(frozen=True)
class Sharding:
    """How the ranks divide one order of samples: micro-batch by micro-batch, in turn.

    Rank r takes the r-th of every ``num_replicas`` consecutive micro-batches. So the same samples
    share a micro-batch whether ranks or accumulation make up the step. Nothing is padded: without
    ``drop_last`` the last micro-batches of an epoch may be short, or empty.

    Attributes:
        length: samples in an epoch.
        batch_size: samples in a micro-batch.
        rank: the data-parallel rank.
        num_replicas: the number of data-parallel ranks, as in torch's ``DistributedSampler``.
        drop_last: leave out the end of an epoch that does not give every rank a whole micro-batch.
    """

    length: int
    batch_size: int
    rank: int = 0
    num_replicas: int = 1
    drop_last: bool = False

    @cached_property
    def stride(self) -> int:
        """The samples that all ranks together take for one micro-batch each."""
        return self.batch_size * self.num_replicas

    @cached_property
    def end(self) -> int:
        """The position at the end of an epoch, in samples."""
        return self.length - self.length % self.stride if self.drop_last else self.length

    def batches_left(self, start: int = 0) -> int:
        """Return how many micro-batches each rank takes from ``start`` to the end of the epoch."""
        return -(-(self.end - start) // self.stride) if start < self.end else 0

    def slice_at(self, position: int) -> tuple[int, int, int]:
        """Return this rank's slice of the order at ``position``: its start, its end and its size.

        A rank whose slice is empty gets rank 0's slice with a size of 0: a dummy batch, so that all
        ranks take the same number of steps.
        """
        end = self.end
        low = position + self.rank * self.batch_size
        if low >= end:
            return position, min(position + self.batch_size, end), 0
        high = min(low + self.batch_size, end)
        return low, high, high - low
