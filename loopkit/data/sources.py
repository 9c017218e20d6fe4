"""The data that a Task returns becomes a source of batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from loopkit import rng
from loopkit.data.batches import SampleCounter
from loopkit.data.collate import StreamCollate
from loopkit.data.combined import CombinedLoader, CombinedSource
from loopkit.data.indexed import IndexedSource
from loopkit.data.known_streams import divides_itself, warn_of_inexact
from loopkit.data.loader import OUT_OF_ORDER, Loader, dataset_length
from loopkit.data.sampler import Sharding
from loopkit.data.stream import StreamSource, has_plain_order
from loopkit.errors import DataError

logger = logging.getLogger(__name__)

Source = IndexedSource | StreamSource | CombinedSource


@dataclass(frozen=True)
class DataConfig:
    """How to read data: what the options say, and which ranks share the data.

    Attributes:
        batch_size: samples per micro-batch, where the data does not say.
        shuffle: whether to shuffle, where the data does not say.
        seed: the seed of the data.
        seeded: whether reading is a function of the seed (``rng="counter"``).
        limit: the most batches of an epoch on each rank, or a fraction of them.
        rank: the data-parallel rank.
        num_replicas: the number of data-parallel ranks.
        tensor_parallel: whether several ranks train on the same samples.
        count_samples: the task's own number of samples in a batch; None reads the number off.
    """

    batch_size: int
    shuffle: bool
    seed: int
    seeded: bool
    limit: int | float | None = None
    rank: int = 0
    num_replicas: int = 1
    tensor_parallel: bool = False
    count_samples: Callable[[Any], Any] | None = None


def open_source(data: Any, config: DataConfig, what: str) -> Source:
    """Return the source that reads ``data``.

    Args:
        data: a Dataset, a DataLoader, a Loader, an iterable of batches, or several of these in a
            dict, a list or a CombinedLoader.
        what: what returned the data, such as ``Digits.train_data()``, for messages.

    Raises:
        DataError: the data cannot be read that way, or is empty.
    """
    several = _combined(data, what)
    if several is not None:
        return _open_combined(several, config, what)
    if isinstance(data, DataLoader) and data.num_workers > 1 and not data.in_order:
        raise DataError(f"{what} returned a DataLoader with in_order=False: {OUT_OF_ORDER}")
    # An order that torch's random streams decide need not be the same on all ranks.
    ordered = config.seeded or config.num_replicas > 1
    if isinstance(data, DataLoader) and ordered and has_plain_order(data):
        logger.debug("%s: the DataLoader has a plain order, so its data set is read instead", what)
        data = _from_dataloader(data)
    sharded = _is_sharded(data, config, what)
    if sharded and config.tensor_parallel:
        raise DataError(
            f"{what} returned data of which each rank has its own samples (sharded), but "
            "the ranks of a tensor-parallel group train on the same ones: leave sharded out"
        )
    if isinstance(data, (IterableDataset, Loader)) or is_map_style(data):
        loader = data if isinstance(data, Loader) else Loader(data)
        if not isinstance(loader.dataset, IterableDataset):
            return _open_indexed(loader, config, what)
        size = loader.batch_size or config.batch_size
        collate, name = loader.collate_fn or default_collate, type(loader.dataset).__name__
        data = DataLoader(
            loader.dataset,
            batch_size=size,
            drop_last=loader.drop_last,
            collate_fn=StreamCollate(collate, name, size, loader.num_workers),
            **loader.worker_options(),
        )
    return _open_stream(data, config, what, sharded=sharded)


def _open_stream(data: Any, config: DataConfig, what: str, *, sharded: bool) -> StreamSource:
    kind = type(data).__name__
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise DataError(
            f"{what} returned {kind}: give a Dataset, a DataLoader, a loopkit.Loader or an "
            "iterable of batches"
        )
    several = config.num_replicas > 1
    if several and not config.seeded and not sharded:
        raise DataError(
            f"{what} returned {kind}, whose order may depend on torch's random streams: on several "
            "ranks rng='stream' takes a Dataset or a Loader over one, or pass rng='counter'"
        )
    if several and not sharded and divides_itself(data):
        raise DataError(
            f"{what} returned {kind} over data that divides itself over the ranks, and loopkit would "
            "divide it again, so that samples are lost: give Loader(data, sharded=True)"
        )
    warn_of_inexact(data, what)
    size = data.batch_size if isinstance(data, DataLoader) else None
    source = StreamSource(
        data,
        seed=config.seed,
        seeded=config.seeded,
        rank=0 if sharded else config.rank,
        num_replicas=1 if sharded else config.num_replicas,
        counter=SampleCounter(config.count_samples, what),
        at_once=size * config.num_replicas if size else None,
    )
    source.uneven = sharded and several
    source.limit = _batch_limit(source.batches_per_epoch(), config.limit, what)
    if source.batches_per_epoch() == 0:
        raise DataError(f"{what} returned {kind} without a batch: there is nothing to read")
    return source


def _is_sharded(data: Any, config: DataConfig, what: str) -> bool:
    """Return whether each rank gets samples of its own from the data.

    Raises:
        DataError: a sampler deals the samples out to other ranks than there are.
    """
    if not isinstance(data, DataLoader):
        return isinstance(data, Loader) and data.sharded
    batches = data.batch_sampler
    for sampler in (batches, data.sampler, getattr(batches, "sampler", None)):
        ranks = getattr(sampler, "num_replicas", 1)
        if not isinstance(ranks, int) or ranks == 1:
            continue
        rank = getattr(sampler, "rank", None)
        if (ranks, rank) != (config.num_replicas, config.rank):
            raise DataError(
                f"{what} returned a DataLoader with a {type(sampler).__name__} for rank {rank} of "
                f"{ranks}, and this is rank {config.rank} of {config.num_replicas}: make it for "
                "this rank, or leave the ranks to loopkit"
            )
        return True
    return False


def _combined(data: Any, what: str) -> CombinedLoader | None:
    """Return data as several data sets; None where it is one.

    Raises:
        DataError: it is unclear what the data is.
    """
    kind = type(data).__name__
    if kind == "DatasetDict":
        raise DataError(
            f"{what} returned a DatasetDict, with the splits {', '.join(data)}: return one of them"
        )
    if kind == "CombinedLoader" and not isinstance(data, CombinedLoader):
        raise DataError(
            f"{what} returned the CombinedLoader of {type(data).__module__.partition('.')[0]}: "
            "give the same arguments to loopkit.data.CombinedLoader"
        )
    if isinstance(data, Mapping):
        data = CombinedLoader(data, "max_size_cycle")
    elif isinstance(data, (list, tuple)) and any(map(is_source, data)):
        data = CombinedLoader(list(data), "max_size_cycle")
    return data if isinstance(data, CombinedLoader) else None


def is_source(part: Any) -> bool:
    """Return whether an entry of a list is a data set, and not a batch."""
    return isinstance(part, (Loader, DataLoader, Dataset, CombinedLoader))


def _open_combined(data: CombinedLoader, config: DataConfig, what: str) -> CombinedSource:
    iterables = data.iterables
    named = iterables if isinstance(iterables, Mapping) else dict(enumerate(iterables))
    sources: dict[Any, IndexedSource | StreamSource] = {}
    for number, (name, part) in enumerate(named.items()):
        where = f"{what}[{name!r}]"
        if not is_source(part) and _is_column(part):
            raise DataError(
                f"{where} is a {type(part).__name__}: if {what} is one data set by column, return "
                "a Dataset, such as TensorDataset; if its values are data sets, wrap each in a "
                "Loader"
            )
        if config.num_replicas > 1 and _is_sharded(part, config, where):
            raise DataError(
                f"{where} gives each rank samples of its own (sharded): "
                "beside other data sets, give one that all ranks read alike"
            )
        # Two sets of the same length must not get the same order.
        seed = rng.mix(config.seed, number)
        alone = replace(config, seed=seed, rank=0, num_replicas=1, limit=None)
        source = open_source(part, alone, where)
        if isinstance(source, CombinedSource):
            raise DataError(f"{where} holds several data sets itself: give them side by side")
        if isinstance(source, StreamSource) and source.keeps_streams:
            raise DataError(
                f"{where} is read with torch's random streams, which it would share with the data "
                "beside it: pass rng='counter', or give a Loader over a Dataset"
            )
        sources[name] = source
    if not sources:
        raise DataError(f"{what} returned no data set: there is nothing to read")
    combined = CombinedSource(
        data,
        sources,
        what,
        rank=config.rank,
        num_replicas=config.num_replicas,
        seeded=config.seeded,
    )
    combined.limit = _batch_limit(combined.batches_per_epoch(), config.limit, what)
    return combined


def _is_column(part: Any) -> bool:
    """Return whether values look like a column of one data set, and not like a data set."""
    if isinstance(part, (torch.Tensor, np.ndarray, str, bytes)):
        return True
    plain = isinstance(part, (list, tuple)) and bool(part)
    return plain and isinstance(part[0], (int, float, str, bytes, bool, type(None)))


def is_map_style(data: Any) -> bool:
    """Return whether data holds samples by index, and is no list or tuple of batches."""
    if isinstance(data, Dataset):
        return True
    sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return sized and not isinstance(data, (list, tuple, dict, str, bytes, DataLoader))


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
        pin_memory_device=loader.pin_memory_device,
        generator=loader.generator or getattr(loader.sampler, "generator", None),
    )


def _open_indexed(loader: Loader, config: DataConfig, what: str) -> IndexedSource:
    kind = type(loader.dataset).__name__
    try:
        dataset_length(loader)
    except TypeError:
        raise DataError(
            f"{what} returned {kind}, which has no len(): derive it from "
            "torch.utils.data.IterableDataset, or give it a length"
        ) from None
    size = loader.batch_size or config.batch_size
    stride = size * config.num_replicas

    def shard(length: int) -> Sharding:
        limit = _batch_limit(-(-length // stride), config.limit, what)
        sharding = Sharding(
            length if limit is None else min(length, limit * stride),
            size,
            rank=config.rank,
            num_replicas=config.num_replicas,
            drop_last=loader.drop_last,
        )
        if sharding.batches_left() == 0:
            reason = f"of {length} samples"
            if length:
                reason += f", fewer than one batch of {size} with drop_last"
            raise DataError(f"{what} returned {kind} {reason}: there is nothing to read")
        return sharding

    return IndexedSource(
        loader, shard, seed=config.seed, shuffle=config.shuffle, seeded=config.seeded
    )


def _batch_limit(count: int | None, limit: int | float | None, what: str) -> int | None:
    """Return a limit in batches; ``count`` is the number of batches without it."""
    if limit is None or isinstance(limit, int):
        return limit
    if count is None:
        raise DataError(
            f"a limit of {limit:.0%} needs data with a length, which {what} does not have: "
            "give a number of batches"
        )
    return max(1, int(count * limit))
