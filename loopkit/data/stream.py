"""Batches of an iterable: a DataLoader, an IterableDataset, a list of batches, a generator."""

from __future__ import annotations

import inspect
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from loopkit import rng
from loopkit.data.batches import SampleCounter
from loopkit.data.iterable_state import IterableState
from loopkit.data.loader import Loader, announce_epoch
from loopkit.data.sampler import WorkItem
from loopkit.data.worker_errors import end_workers, is_worker_failure
from loopkit.errors import DataError, LoopkitWarning, OptionError

LONG_REPLAY = 1000


class BatchCounting(ABC):
    """A source whose position counts the batches of all ranks; each rank takes every n-th one."""

    unit = "Batches"
    num_replicas: int
    limit: int | None

    @abstractmethod
    def promised(self) -> int | None:
        """Return the position at the end of an epoch by the data's lengths, which may be guesses."""

    def batches_per_epoch(self) -> int | None:
        """Return how many micro-batches this rank takes in an epoch; None without a length."""
        promised = self.promised()
        return None if promised is None else -(-promised // self.num_replicas)

    def stride(self) -> int:
        """Return by how much one micro-batch on every rank moves the position."""
        return self.num_replicas

    def samples_at(self, epoch: int, start: int, end: int) -> list[int]:
        """Return batch numbers: such a source does not tell the indices of its samples."""
        return list(range(start, end))


class StreamSource(BatchCounting):
    """An iterable of batches, which every rank reads whole; each rank takes every n-th batch.

    To continue at a position, the source loads the iterable's own state, or reads it again from the
    start of the epoch. The position counts the batches of all ranks.

    With ``seeded``, all random generators are seeded from seed, epoch and batch number before each
    batch, so that reading again gives the same batches. Without it (``rng="stream"``), the state of
    the random streams at the start of the epoch is kept, and restored before reading again.

    Args:
        batches: the iterable.
        seed: the seed of the data.
        seeded: whether to seed the generators before each batch.
        rank: the data-parallel rank.
        num_replicas: the number of data-parallel ranks that share the batches.
        counter: counts the samples in a batch; None reads the number off.
        at_once: the samples of one batch on every rank; None where the batches are not made here.

    Attributes:
        limit: the most batches of an epoch that each rank takes; None for all.
        uneven: whether each rank has data of its own, which may end at different times.
        keeps_state: whether a state is needed besides the position.
        keeps_streams: whether that state has torch's random streams.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        seed: int,
        seeded: bool,
        limit: int | None = None,
        rank: int = 0,
        num_replicas: int = 1,
        counter: SampleCounter | None = None,
        at_once: int | None = None,
    ) -> None:
        self.batches = batches
        self._at_once = at_once
        self._counter = counter or SampleCounter(None, type(batches).__name__)
        self.seed = seed
        self.seeded = seeded
        self.limit = limit
        self.rank = rank
        self.num_replicas = num_replicas
        self.uneven = False
        self._is_exact = isinstance(batches, (list, tuple)) or (
            isinstance(batches, torch.utils.data.DataLoader)
            and not isinstance(batches.dataset, torch.utils.data.IterableDataset)
            and has_plain_order(batches)
        )
        # Reading a list draws no random numbers, and worker processes have their own generators.
        in_process = not getattr(batches, "num_workers", 0)
        self._seeds_reads = seeded and in_process and not isinstance(batches, (list, tuple))
        self._state = IterableState(batches, keeps_streams=not seeded)
        self.keeps_state = self._state.is_kept
        self.keeps_streams = not seeded and not isinstance(batches, (list, tuple))

    def samples_at_once(self) -> int:
        """Return the samples of one micro-batch on all ranks.

        Raises:
            OptionError: the batches are the data's own, of a size that only they know.
        """
        if self._at_once is None:
            raise OptionError(
                "global_batch_size needs the number of samples that all devices take at once, and "
                f"{type(self.batches).__name__} gives batches of its own: give accumulate="
            )
        return self._at_once

    def promised(self) -> int | None:
        """Return the position at the end of an epoch by ``len()``, which may be a guess."""
        try:
            length = len(self.batches)  # type: ignore[arg-type]
        except TypeError:
            return None
        if self.uneven:
            return None
        return length if self.limit is None else min(length, self.limit * self.num_replicas)

    def end(self) -> int | None:
        """Return the position at the end of an epoch; None where only reading on can tell.

        Only the length of a list, or of torch's own sampling, is exact. Others are often guesses:
        those of an IterableDataset with workers, or of a batch sampler by size. Where ranks have
        data of their own, no rank knows the lengths of the others.
        """
        return self.promised() if self._is_exact else None

    def open(self, epoch: int, start: int, again: int = 0) -> Iterator[WorkItem]:
        """Yield this rank's micro-batches from ``start`` of ``epoch``, in batches.

        At the end of the data a rank may get a dummy batch, of size 0.

        Args:
            epoch: the epoch.
            start: the position.
            again: how often the iterable was read to its end in this epoch.

        Raises:
            DataError: the iterable can be read only once, or no longer has ``start`` batches.
        """
        base = rng.mix(self.seed, epoch, 2) if not again else rng.mix(self.seed, epoch, 2, again)
        iterator = self._resumed(epoch, start, base) if start else self._begin(epoch, base)
        state = self._state
        number = start
        replicas = self.num_replicas
        count = self._counter.count
        batch: Any = None
        size = 0
        total = 0
        while self.limit is None or number < self.limit * replicas:
            if self._seeds_reads:
                rng.seed_all(rng.at_step(base, number, 0))
            try:
                read = next(iterator)
            except StopIteration:
                state.exhausted = True
                break
            except Exception as error:
                end_workers(self.batches, iterator)
                if not (getattr(self.batches, "num_workers", 0) and is_worker_failure(error)):
                    raise
                raise DataError(
                    f"a worker of the {type(self.batches).__name__} over "
                    f"{type(getattr(self.batches, 'dataset', None)).__name__} failed at or after "
                    f"batch {number} of epoch {epoch}: {error}"
                ) from error
            turn = (number - start) % replicas
            if number == start:
                self._counter.check(read)
            read_size = count(read)
            if read_size is None:
                raise self._counter.unknown(read)
            number += 1
            if turn == 0:
                # Stays the batch of a rank that the data does not reach, as a dummy.
                batch = read
                size = 0
                total = 0
            if turn == self.rank:
                batch, size = read, read_size
            total += read_size
            if turn == replicas - 1:
                if state.stateful is not None:
                    state.note(iterator)
                yield WorkItem(batch, size, total, number)
        if (number - start) % replicas:
            yield WorkItem(batch, size, total, number)
        if number == 0 and epoch > 0 and iter(self.batches) is self.batches:
            name = type(self.batches).__name__
            raise DataError(
                f"the training data is a {name}, which can be read only once, and epoch {epoch} "
                "needs it again: give an iterable that starts again at each iter(), or fewer steps"
            )

    def _begin(self, epoch: int, base: int) -> Iterator[Any]:
        """Start the pass number ``epoch`` at its first batch."""
        announce_epoch(self.batches, epoch)
        if self.seeded:
            rng.seed_all(base)
        return self._state.begin()

    def _resumed(self, epoch: int, start: int, base: int) -> Iterator[Any]:
        self._state.check_reading(start)
        if self._state.has_own:
            announce_epoch(self.batches, epoch)
            return self._state.resume()
        now = rng.get_state()
        self._state.rewind()
        iterator = self._begin(epoch, base)
        if start >= LONG_REPLAY:
            warnings.warn(
                f"resuming reads {start} batches of {type(self.batches).__name__} again to reach "
                "its position; give it state_dict/load_state_dict, or use a Loader, to start there "
                "at once",
                LoopkitWarning,
                stacklevel=2,
            )
        for number in range(start):
            if self._seeds_reads:
                rng.seed_all(rng.at_step(base, number, 0))
            if next(iterator, iterator) is iterator:
                raise DataError(
                    f"the training data gave {number} batches where the resumed run had read "
                    f"{start}: it changed since the checkpoint was saved"
                )
        if not self.seeded:
            rng.set_state(now)
        return iterator

    def stateful_parts(self) -> list[Any]:
        """Return the objects that reading changes and that have ``state_dict``."""
        return [] if self._state.stateful is None else [self._state.stateful]

    def state(self) -> dict[str, Any] | None:
        """Return what is needed besides the position to continue there; None for nothing."""
        return self._state.within_pass()

    def end_state(self) -> dict[str, Any] | None:
        """Return what the next pass needs, where a pass has ended; None for nothing."""
        return self._state.after_pass()

    def load_state(self, state: dict[str, Any] | None) -> None:
        """Take back what ``state`` or ``end_state`` returned, for the next ``open``."""
        self._state.load(state)

    def close(self) -> None:
        """Do nothing: the source holds no resources."""


def has_plain_order(loader: torch.utils.data.DataLoader[Any]) -> bool:
    """Return whether a DataLoader reads in order or in torch's own shuffle, without replacement.

    Its batches are then a function of the position. A DistributedSampler counts as well: here the
    ranks share the data without the padding that it adds. A DataLoader with a setting that this
    version of loopkit does not know has no plain order, and is read as it is.
    """
    data = torch.utils.data
    if type(loader) is not data.DataLoader or loader.batch_size is None:
        return False
    if type(loader.batch_sampler) is not data.BatchSampler or _has_unknown_setting(loader):
        return False
    sampler = loader.sampler
    if type(sampler) in (data.SequentialSampler, data.distributed.DistributedSampler):
        return True
    return (
        type(sampler) is data.RandomSampler
        and not sampler.replacement
        and sampler.num_samples == len(sampler.data_source)
    )


def _has_unknown_setting(loader: torch.utils.data.DataLoader[Any]) -> bool:
    known = inspect.signature(Loader).parameters.keys() | {"sampler", "batch_sampler"}
    settings = inspect.signature(type(loader)).parameters
    return any(
        getattr(loader, name, setting.default) != setting.default
        for name, setting in settings.items()
        if name not in known
    )
