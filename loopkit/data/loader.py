"""Loader: how a map-style data set becomes batches, by indices that are a function of the position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from operator import itemgetter
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset, default_collate

from loopkit import rng
from loopkit.data.sampler import Sharding, WorkItem, group_by_length, permutation, weighted_sample
from loopkit.errors import DataError, LoopkitError, OptionError
from loopkit.keywords import checks_keywords


@checks_keywords
class Loader:
    """A data set and how to read it. What is left None is chosen by the use: training shuffles,
    evaluation not.

    Args:
        dataset: anything with ``len()`` and ``[index]``, or a ``torch.utils.data.IterableDataset``.
        batch_size: samples per batch and device; None takes ``Fit(batch_size=)`` or
            ``eval_batch_size``.
        shuffle: a new order every epoch.
        num_workers: processes that read ahead; 0 reads in the training process.
        pin_memory: page-locked memory for the copy to a GPU; "auto" pins where there is one.
        drop_last: leave out an epoch's last, shorter batch.
        prefetch_factor: batches each worker reads ahead.
        persistent_workers: keep the workers between epochs.
        collate_fn: list of samples to batch; None stacks tensors, numbers and arrays, through dicts
            and tuples.
        columns: for samples that are dicts, the keys to keep.
        group_by_length: bring samples of like length into the same batches: True takes ``len()`` of
            a sample (of its "input_ids"), a key takes that entry's, or give the lengths themselves,
            one per sample.
        weights: draw samples with replacement, each with a chance in proportion to its weight; one
            per sample.
        length: samples per epoch, where weights draw them; None takes the data set's length.
        timeout: seconds to wait for a worker before giving up; 0 waits for ever.
        worker_init_fn: called in each worker with its number, before it reads.
        multiprocessing_context: how workers start: "fork", "spawn", "forkserver" or a context;
            None takes the platform's default.
        sharded: for an IterableDataset that gives each rank samples of its own; without it every
            rank reads all of them and takes its share. Ranks may then run out at different times.

    Raises:
        OptionError: a negative or non-integer size or count.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int | None = None,
        *,
        shuffle: bool | None = None,
        num_workers: int = 0,
        pin_memory: bool | str = "auto",
        drop_last: bool = False,
        prefetch_factor: int | None = 2,
        persistent_workers: bool = True,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        columns: Sequence[str] | None = None,
        group_by_length: bool | str | Sequence[int] = False,
        weights: Sequence[float] | torch.Tensor | None = None,
        length: int | None = None,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: str | BaseContext | None = None,
        sharded: bool = False,
    ) -> None:
        positive = {"batch_size": batch_size, "prefetch_factor": prefetch_factor, "length": length}
        for name, value, least in [
            ("num_workers", num_workers, 0),
            *((name, value, 1) for name, value in positive.items()),
        ]:
            if value is not None and (not isinstance(value, int) or value < least):
                raise OptionError(
                    f"Loader({name}={value!r}): give a whole number of at least {least}"
                )
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.prefetch_factor = prefetch_factor
        self.persistent_workers = persistent_workers
        self.collate_fn = collate_fn
        self.columns = None if columns is None else tuple(columns)
        self.group_by_length = group_by_length
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        self.length = length
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.sharded = sharded

    def worker_options(self) -> dict[str, Any]:
        """The arguments of ``torch.utils.data.DataLoader`` that concern its workers."""
        options: dict[str, Any] = {
            "num_workers": self.num_workers,
            "worker_init_fn": self.worker_init_fn,
            "pin_memory": self.pin_memory,
        }
        if self.pin_memory == "auto":
            options["pin_memory"] = torch.cuda.is_available()
        if self.num_workers:
            options |= {
                "prefetch_factor": self.prefetch_factor,
                "persistent_workers": self.persistent_workers,
                "multiprocessing_context": self.multiprocessing_context,
                "timeout": self.timeout,
            }
        return options


class _Samples(Dataset[Any]):
    """The data set by (epoch, index), every sample read under its own seed: the same in any worker."""

    def __init__(self, loader: Loader, seed: int, seeded: bool) -> None:
        self.dataset = loader.dataset
        self.columns = loader.columns
        self.seed = seed
        self.seeded = seeded

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        if self.seeded:
            rng.seed_all(rng.mix(self.seed, epoch, index, 1))
        try:
            sample = self.dataset[index]
            return sample if self.columns is None else {name: sample[name] for name in self.columns}
        except LoopkitError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{type(self.dataset).__name__}[{index}] failed in epoch {epoch}: {what}"
            ) from error


class _EpochIndices:
    """The batch sampler handed to worker processes: re-aimed before each epoch, read by ``iter``."""

    def __init__(self) -> None:
        self.keys: Iterator[list[tuple[int, int]]] = iter(())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.keys


class IndexedSource:
    """Batches of a map-style data set; any (epoch, position) can be opened at once and gives the
    same batches.

    With ``seeded`` every sample is read under a seed of its own, so augmentation does not depend on
    workers, batch size or ranks. Without it (``rng="stream"`` and no workers) samples draw from
    torch's own streams.
    """

    unit = "Samples"
    uneven = False

    def __init__(
        self, loader: Loader, sharding: Sharding, *, seed: int, shuffle: bool, seeded: bool
    ) -> None:
        self.loader = loader
        self.sharding = sharding
        self.seed = seed
        self.shuffle = shuffle if loader.shuffle is None else loader.shuffle
        self._collate = loader.collate_fn or default_collate
        self.seeded = seeded
        self._samples = _Samples(loader, seed, seeded or loader.num_workers > 0)
        self._columns = self._plain_columns()
        self._lengths = self._read_lengths()
        self._indices = _EpochIndices()
        self._workers: DataLoader[Any] | None = None

    def _plain_columns(self) -> tuple[torch.Tensor, ...] | None:
        # Stacking the rows of a TensorDataset one by one gives what one indexing gives, a hundred
        # times slower.
        plain = type(self.loader.dataset) is TensorDataset and self._collate is default_collate
        return self.loader.dataset.tensors if plain and not self.loader.num_workers else None

    def batches_per_epoch(self) -> int | None:
        """Micro-batches that this rank takes in one epoch."""
        return self.sharding.rounds()

    def stride(self) -> int:
        """By how much one micro-batch of every rank moves the position."""
        return self.sharding.round_size

    def end(self) -> int:
        """The position at which an epoch is over, in samples."""
        return self.sharding.end

    def permutation(self, epoch: int) -> Any:
        """The sample indices in the order in which ``epoch`` reads them."""
        length, loader = self.sharding.length, self.loader
        if loader.weights is not None and self.shuffle:
            indices: Any = weighted_sample(self._weights(), length, seed=self.seed, epoch=epoch)
        else:
            indices = permutation(length, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        return (
            indices
            if self._lengths is None
            else group_by_length(indices, self._lengths, self.sharding.round_size)
        )

    def _weights(self) -> torch.Tensor:
        weights = self.loader.weights
        assert weights is not None
        if len(weights) != len(self.loader.dataset) or not bool(
            (weights >= 0).all() and weights.sum() > 0
        ):
            raise DataError(
                f"Loader(weights=...) holds {len(weights)} weights for {len(self.loader.dataset)} "
                f"samples: "
                "give one for each, none negative, not all 0"
            )
        return weights

    def _read_lengths(self) -> torch.Tensor | None:
        asked, dataset = self.loader.group_by_length, self.loader.dataset
        if asked is False or not self.shuffle:
            return None
        if isinstance(asked, (bool, str)):
            key = "input_ids" if asked is True else asked
            samples = (dataset[index] for index in range(len(dataset)))
            lengths = [len(s[key]) if isinstance(s, Mapping) else len(s) for s in samples]
        else:
            lengths = list(asked)
        if len(lengths) != len(dataset):
            raise DataError(
                f"Loader(group_by_length=...) holds {len(lengths)} lengths for {len(dataset)} "
                f"samples"
            )
        return torch.tensor(lengths)

    def samples_at(self, epoch: int, start: int, end: int) -> list[int]:
        """The sample indices between two positions of an epoch, over all ranks."""
        indices = self.permutation(epoch)
        return [int(index) for index in indices[start:end]]

    def open(self, epoch: int, start: int) -> Iterator[WorkItem]:
        """Yield each turn from position ``start`` of ``epoch``, in samples.

        A size of 0 marks a batch that stands in where this rank has no sample of a round.
        """
        read = self._from_workers if self.loader.num_workers else self._in_process
        return read(epoch, start, self.permutation(epoch))

    def _in_process(self, epoch: int, start: int, indices: Any) -> Iterator[WorkItem]:
        columns, collate, samples, sharding = (
            self._columns,
            self._collate,
            self._samples,
            self.sharding,
        )
        epoch_end, stride = sharding.end, sharding.round_size
        for position in range(start, epoch_end, stride):
            low, high, size = sharding.read(position)
            if columns is None:
                batch = collate([samples[epoch, int(index)] for index in indices[low:high]])
            else:
                rows = slice(low, high) if isinstance(indices, range) else indices[low:high]
                batch = tuple(map(itemgetter(rows), columns))
            end = min(position + stride, epoch_end)
            yield batch, size, end - position, end

    def _from_workers(self, epoch: int, start: int, indices: Any) -> Iterator[WorkItem]:
        sharding = self.sharding
        if self._workers is None:
            self._workers = DataLoader(
                self._samples,
                batch_sampler=self._indices,
                collate_fn=self._collate,
                generator=torch.Generator(),  # else every epoch would draw from the global stream
                **self.loader.worker_options(),
            )
        positions = range(start, sharding.end, sharding.round_size)
        slices = [sharding.read(position) for position in positions]
        self._indices.keys = (
            [(epoch, int(index)) for index in indices[low:high]] for low, high, _ in slices
        )
        batches = iter(self._workers)
        for position, (low, high, size) in zip(positions, slices):
            try:
                batch = next(batches)
            except RuntimeError as error:
                if isinstance(error, LoopkitError) or "worker" not in str(error):
                    raise
                ids = ", ".join(str(int(index)) for index in indices[low:high][:8])
                name = type(self.loader.dataset).__name__
                where = f"at or after the batch of samples {ids}"
                raise DataError(f"a worker reading {name} failed {where}: {error}") from error
            end = min(position + sharding.round_size, sharding.end)
            yield batch, size, end - position, end

    def state(self) -> None:
        """Nothing: the position says it all."""

    def close(self) -> None:
        """End the worker processes."""
        self._workers = None


def mixed(
    datasets: Mapping[str, Any],
    shares: Mapping[str, float],
    *,
    length: int | None = None,
    **options: Any,
) -> Loader:
    """A Loader over several data sets, each with its share of the samples whatever its size.

    Args:
        datasets: map-style data sets by name.
        shares: how often each is drawn from, in proportion; a data set with a share of 0 is not
            read.
        length: samples per epoch; None takes as many as the data sets hold together.
        options: those of Loader.

    Raises:
        OptionError: a data set without a share, or a share without a data set.
    """
    if datasets.keys() != shares.keys():
        raise OptionError(
            f"mixed(): the data sets are {', '.join(datasets)}, the shares are for "
            f"{', '.join(shares)}"
        )
    parts = list(datasets.items())
    weights = torch.cat(
        [torch.full((len(part),), shares[name] / max(1, len(part))) for name, part in parts]
    )
    joined: ConcatDataset[Any] = ConcatDataset([part for _, part in parts])
    return Loader(joined, weights=weights, length=length, **options)
