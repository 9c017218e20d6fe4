"""Turning what a Task returns as data into a source of batches, and a source into groups for one
step each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler

from loopkit.data.loader import IndexedSource, Loader
from loopkit.data.nested import token_count
from loopkit.data.sampler import Sharding
from loopkit.data.stream import StreamSource, is_plain
from loopkit.errors import DataError

Source = IndexedSource | StreamSource


@dataclass(slots=True, eq=False, repr=False)
class MicroBatches(list[Any]):
    """The micro-batches of one optimizer step, on the device, and their counts.

    Attributes:
        sizes: samples in each micro-batch of this rank. A dummy batch has size 0: it is forwarded
            so that every rank takes part in the step, with weight zero.
        samples: samples in all micro-batches of this rank.
        total: samples in all micro-batches of all ranks.
        start: the data position before the group, in the unit of the source.
        end: the data position after the group.
        tokens: elements of ``input_ids`` on all ranks; 0 where batches have none.
        last: whether the group is known to be the last of its epoch.
        state: the source's own state after the group, for sources that have one.
    """

    start: int = 0
    end: int = 0
    sizes: list[int] = field(default_factory=list)
    samples: int = 0
    total: int = 0
    tokens: int = 0
    last: bool = False
    state: Any = None

    def with_batches(self, batches: Iterable[Any], sizes: Iterable[int]) -> MicroBatches:
        """Return a copy that holds ``batches`` of ``sizes``; all other attributes are kept."""
        group = copy(self)
        group[:] = batches
        group.sizes = list(sizes)
        return group

    def padded(self, count: int) -> MicroBatches:
        """Return a copy of ``count`` micro-batches: dummy batches fill it up.

        Each counts as one unit of the position, as in sources whose ranks read data of their own.
        """
        missing = count - len(self)
        group = self.with_batches([*self, *self[-1:] * missing], [*self.sizes, *[0] * missing])
        group.end = group.start + count
        return group

    def dummies(self, count: int) -> MicroBatches:
        """Return a group of ``count`` dummy batches, without samples, that follows this one."""
        group = self.with_batches(self[-1:] * count, [0] * count)
        group.start = self.end
        group.end = self.end + count
        group.samples = 0
        group.total = 0
        group.tokens = 0
        return group


@dataclass(frozen=True)
class DataConfig:
    """How data is to be read: what the options say, and the place among the ranks."""

    batch_size: int
    shuffle: bool
    seed: int
    seeded: bool
    limit: int | float | None = None
    rank: int = 0
    world: int = 1
    teams: bool = False


def open_source(data: Any, reading: DataConfig, what: str) -> Source:
    """The source for whatever ``what`` (say, ``Digits.train_data()``) returned.

    Raises:
        DataError: it is nothing that can be read, or holds nothing.
    """
    # Drawn from torch's streams, an order need not be the same on all ranks.
    if isinstance(data, DataLoader) and (reading.seeded or reading.world > 1) and is_plain(data):
        data = _from_dataloader(data)
    sharded = isinstance(data, Loader) and data.sharded
    if sharded and reading.teams:
        raise DataError(
            f"{what} returned a Loader(sharded=True), where each rank has samples of its own, and "
            f"under "
            "TensorParallel a team of ranks trains on the same ones: leave sharded out"
        )
    if isinstance(data, (IterableDataset, Loader)) or _is_map_style(data):
        loader = data if isinstance(data, Loader) else Loader(data)
        if not isinstance(loader.dataset, IterableDataset):
            return _indexed(loader, reading, what)
        options: dict[str, Any] = {
            "batch_size": loader.batch_size or reading.batch_size,
            "drop_last": loader.drop_last,
        }
        data = DataLoader(
            loader.dataset, collate_fn=loader.collate_fn, **options, **loader.worker_options()
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes, torch.Tensor)):
        raise DataError(
            f"{what} returned {type(data).__name__}: give a Dataset, a DataLoader, a "
            f"loopkit.Loader "
            "or an iterable of batches"
        )
    if reading.world > 1 and not reading.seeded and not sharded:
        raise DataError(
            f"{what} returned {type(data).__name__}, whose order torch's streams may decide: on "
            f"several "
            "ranks rng='stream' takes a Dataset or a Loader over one, or pass rng='counter'"
        )
    shares = (0, 1) if sharded else (reading.rank, reading.world)
    source = StreamSource(data, seed=reading.seed, seeded=reading.seeded, shares=shares)
    source.uneven = sharded and reading.world > 1
    source.limit = _limited(source.batches_per_epoch(), reading.limit, what)
    if source.batches_per_epoch() == 0:
        raise DataError(
            f"{what} returned {type(data).__name__} without a single batch: there is nothing to "
            f"read"
        )
    return source


def _is_map_style(data: Any) -> bool:
    if isinstance(data, Dataset):
        return True
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return sized and not isinstance(data, (list, tuple, dict, str, bytes, torch.Tensor, DataLoader))


def _from_dataloader(loader: DataLoader[Any]) -> Loader:
    return Loader(
        loader.dataset,
        loader.batch_size,
        shuffle=getattr(loader.sampler, "shuffle", type(loader.sampler) is not SequentialSampler),
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory or "auto",
        drop_last=loader.drop_last,
        prefetch_factor=loader.prefetch_factor or 2,
        persistent_workers=loader.persistent_workers,
        collate_fn=loader.collate_fn,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
    )


def _indexed(loader: Loader, reading: DataConfig, what: str) -> IndexedSource:
    try:
        length = len(loader.dataset)
    except TypeError:
        raise DataError(
            f"{what} returned {type(loader.dataset).__name__}, which has no len(): "
            "derive it from torch.utils.data.IterableDataset, or give it a length"
        ) from None
    if loader.weights is not None and loader.length is not None and length:
        length = loader.length
    size = loader.batch_size or reading.batch_size
    limit = _limited(-(-length // (size * reading.world)), reading.limit, what)
    if limit is not None:
        length = min(length, limit * size * reading.world)
    sharding = Sharding(length, size, reading.rank, reading.world, loader.drop_last)
    if sharding.rounds() == 0:
        why = f"of {length} samples" + (
            f", fewer than one batch of {size} with drop_last" if length else ""
        )
        raise DataError(
            f"{what} returned {type(loader.dataset).__name__} {why}: there is nothing to read"
        )
    seeded = reading.seeded
    return IndexedSource(
        loader, sharding, seed=reading.seed, shuffle=reading.shuffle, seeded=seeded
    )


def _limited(count: int | None, limit: int | float | None, what: str) -> int | None:
    if limit is None or isinstance(limit, int):
        return limit
    if count is None:
        raise DataError(
            f"a limit of {limit:.0%} needs data with a length, which {what} has not: give batches"
        )
    return max(1, int(count * limit))


class MicroBatchLoader:
    """Training data as groups of micro-batches, one group per optimizer step, from any position on.

    Args:
        source: where batches come from.
        accumulate: micro-batches per group; the last group of an epoch may hold fewer.
        bring: brings groups to the device (``loopkit.data.prefetch.prefetch_to``), or None.
    """

    def __init__(
        self,
        source: Source,
        accumulate: int,
        bring: Callable[..., Iterator[MicroBatches]] | None = None,
    ) -> None:
        self.source = source
        self.accumulate = accumulate
        self.bring = bring

    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one epoch; None for data without a length."""
        batches = self.source.batches_per_epoch()
        return None if batches is None else -(-batches // self.accumulate)

    def step_size(self) -> int:
        """By how much one optimizer step moves the position, but for an epoch's last."""
        return self.accumulate * self.source.stride()

    def open(self, epoch: int, start: int) -> Iterator[MicroBatches]:
        """The groups of ``epoch`` from the position ``start``; the last one is marked.

        Of data without a length only the absence of a next group tells the last. Looking for it
        draws from torch's streams out of turn, so under ``rng="stream"`` such data leaves its last
        group unmarked.
        """
        groups = self._groups(epoch, start)
        if self.bring is not None:
            groups = self.bring(groups)
        marks_itself = self.source.end() is not None or not self.source.seeded or self.source.uneven
        return groups if marks_itself else _last_marked(groups)

    def _groups(self, epoch: int, start: int) -> Iterator[MicroBatches]:
        source, accumulate, epoch_end = self.source, self.accumulate, self.source.end()
        keeps_state = isinstance(source, StreamSource) and source.keeps_state
        group = MicroBatches(start, start)
        for batch, size, total, end in source.open(epoch, start):
            group.append(batch)
            group.sizes.append(size)
            group.samples += size
            group.total += total
            group.end = end
            if (
                size and not isinstance(batch, (tuple, list)) and isinstance(batch, Mapping)
            ):  # the second is quicker
                group.tokens += token_count(batch)
            if len(group) == accumulate or end == epoch_end:
                group.last = end == epoch_end
                if keeps_state:
                    group.state = source.state()
                yield group
                group = MicroBatches(end, end)
        if group:
            group.state = source.state() if keeps_state else None
            yield group


def _last_marked(groups: Iterator[MicroBatches]) -> Iterator[MicroBatches]:
    held = next(groups, None)
    while held is not None:
        following = next(groups, None)
        held.last = following is None
        yield held
        held = following
