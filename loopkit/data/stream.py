"""Batches of anything that can only be iterated: DataLoaders, IterableDatasets, lists of batches,
generators.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from loopkit import rng
from loopkit.data.nested import batch_size
from loopkit.data.sampler import WorkItem
from loopkit.errors import DataError, LoopkitWarning

LONG_REPLAY = 1000


class StreamSource:
    """An iterable of batches. A position in it is reached by its own ``state_dict``, or by reading
    again.

    With ``seeded`` all generators are seeded from (seed, epoch, batch number) before each fetch, so
    that reading again gives the same batches. Without it (``rng="stream"``) the streams' state at
    the start of the
    epoch is kept, and put back before reading again: exactly what a hand-written loop draws.

    Of several ranks each reads all batches and takes those of its turn, so that none needs to know
    of the others. The position counts the batches of all.

    Attributes:
        shares: (rank, ranks) among whom the batches are dealt out.
        limit: the most batches that each rank takes.
        uneven: whether ranks have data of their own, which may end at different times.
    """

    unit = "Batches"

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        seed: int,
        seeded: bool,
        limit: int | None = None,
        shares: tuple[int, int] = (0, 1),
    ) -> None:
        self.batches = batches
        self.seed = seed
        self.seeded = seeded
        self.limit = limit
        self.rank, self.ranks = shares
        self.uneven = False
        # A list draws nothing when read, and workers have generators of their own.
        self._seeds_reads = (
            seeded
            and not isinstance(batches, (list, tuple))
            and not getattr(batches, "num_workers", 0)
        )
        self.keeps_state = not seeded or hasattr(batches, "state_dict")
        self._epoch_streams: dict[str, Any] | None = None
        self._own_state: Any = None
        self._restored: dict[str, Any] | None = None

    def batches_per_epoch(self) -> int | None:
        """Micro-batches that this rank takes in one epoch, if the iterable has a length."""
        end = self.end()
        return None if end is None else -(-end // self.ranks)

    def stride(self) -> int:
        """By how much one micro-batch of every rank moves the position."""
        return self.ranks

    def end(self) -> int | None:
        """The position at which an epoch is over; None where only reading on can tell."""
        try:
            length = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return None
        if self.uneven:  # the others' lengths are not known
            return None
        return length if self.limit is None else min(length, self.limit * self.ranks)

    def samples_at(self, epoch: int, start: int, end: int) -> list[int]:
        """Batch numbers stand in for sample ids, which an iterable does not tell."""
        return list(range(start, end))

    def open(self, epoch: int, start: int) -> Iterator[WorkItem]:
        """Yield each turn from position ``start`` of ``epoch``, in batches.

        A size of 0 marks a batch that stands in where the last round has none for this rank.
        """
        restored, self._restored = self._restored, None
        iterator = self._resumed(epoch, start, restored) if start else self._begin(epoch)
        number, base, owns_state = (
            start,
            rng.mix(self.seed, epoch, 2),
            hasattr(self.batches, "state_dict"),
        )
        held: Any = None
        total = 0
        while self.limit is None or number < self.limit * self.ranks:
            if self._seeds_reads:
                rng.seed_all(rng.at_step(base, number, 0))
            try:
                batch = next(iterator)
            except StopIteration:
                break
            turn = (number - start) % self.ranks
            number += 1
            size = batch_size(batch)
            if turn == 0:
                held, total = (batch, 0), 0
            if turn == self.rank:
                held = batch, size
            total += size
            if turn == self.ranks - 1:
                if owns_state:
                    self._own_state = self.batches.state_dict()  # type: ignore[attr-defined]
                yield *held, total, number
        if (number - start) % self.ranks:
            yield *held, total, number
        if number == 0 and epoch > 0 and iter(self.batches) is self.batches:
            name = type(self.batches).__name__
            raise DataError(
                f"the training data is a {name}, which can be read once, and epoch {epoch} needs "
                f"it "
                "again: give an iterable that starts anew at each iter(), or fewer steps"
            )

    def _begin(self, epoch: int) -> Iterator[Any]:
        parts: list[Any] = [
            self.batches,
            *(getattr(self.batches, name, None) for name in ("sampler", "dataset")),
        ]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if self.seeded:
            rng.seed_all(rng.mix(self.seed, epoch, 2))
        else:
            self._epoch_streams = rng.get_state()
        return iter(self.batches)

    def _resumed(self, epoch: int, start: int, restored: dict[str, Any] | None) -> Iterator[Any]:
        if (
            restored
            and restored.get("own") is not None
            and hasattr(self.batches, "load_state_dict")
        ):
            self.batches.load_state_dict(restored["own"])
            self._epoch_streams = restored.get("streams")
            return iter(self.batches)
        now = rng.get_state()
        if restored and restored.get("streams"):
            rng.set_state(restored["streams"])
        iterator = self._begin(epoch)
        if start >= LONG_REPLAY:
            warnings.warn(
                f"resuming reads {start} batches of {type(self.batches).__name__} again to reach "
                f"its place; "
                "give it state_dict/load_state_dict, or use a Loader, to start there at once",
                LoopkitWarning,
                stacklevel=2,
            )
        base = rng.mix(self.seed, epoch, 2)
        for number in range(start):
            if self._seeds_reads:
                rng.seed_all(rng.at_step(base, number, 0))
            if next(iterator, iterator) is iterator:
                raise DataError(
                    f"the training data gave {number} batches where the resumed run had read "
                    f"{start}: "
                    "it changed since the checkpoint was saved"
                )
        if not self.seeded:
            rng.set_state(now)
        return iterator

    def state(self) -> dict[str, Any] | None:
        """What reaching the present position needs besides the position."""
        if self._own_state is None and self._epoch_streams is None:
            return None
        return {"own": self._own_state, "streams": self._epoch_streams}

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take what ``state`` gave; the next ``open`` uses it."""
        self._restored = state

    def close(self) -> None:
        """Nothing is held."""


def is_plain(loader: torch.utils.data.DataLoader[Any]) -> bool:
    """Whether a DataLoader's order is torch's own shuffling or counting, so that it can be told
    from a position.

    A DistributedSampler counts: its ranks' shares are dealt out here, without the padding that it
    adds.
    """
    data = torch.utils.data
    return (
        type(loader) is data.DataLoader
        and type(loader.batch_sampler) is data.BatchSampler
        and loader.batch_size is not None
        and (
            type(loader.sampler) in (data.SequentialSampler, data.distributed.DistributedSampler)
            or (
                type(loader.sampler) is data.RandomSampler
                and not loader.sampler.replacement
                and loader.sampler.num_samples == len(loader.sampler.data_source)
            )
        )
    )
