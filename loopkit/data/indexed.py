"""The source that reads a map-style data set from any position."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate

from loopkit.data.collate import collate_error
from loopkit.data.loader import Loader, announce_epoch, dataset_length
from loopkit.data.sampler import Sharding, WorkItem, group_by_length, permutation, weighted_sample
from loopkit.data.samples import SeededSamples
from loopkit.data.worker_errors import end_workers, is_worker_failure
from loopkit.data.worker_transfer import worker_transfer
from loopkit.errors import DataError


class _WorkerCollate:
    """The collate function in a worker process; its errors name the samples."""

    def __init__(self, collate: Callable[[list[Any]], Any], name: str, num_workers: int) -> None:
        self.collate = collate
        self.name = name
        self.transfer = worker_transfer(num_workers)

    def __call__(self, samples: Any) -> Any:
        try:
            batch = self.collate(list(samples))
        except Exception as error:
            epoch = samples.keys[0][0]
            indices = [index for _, index in samples.keys]
            raise collate_error(error, self.name, samples, indices, epoch) from error
        return self.transfer(batch)


class _EpochBatches:
    """The batch sampler of the worker processes; it gets the keys of each epoch's batches."""

    def __init__(self) -> None:
        self.keys: Iterator[list[tuple[int, int]]] = iter(())

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.keys


class IndexedSource:
    """Batches of a map-style data set, which can be read from any epoch and position at once.

    With ``seeded`` every sample is read under its own seed, so augmentation does not depend on
    workers, batch size or ranks. Without it (``rng="stream"`` and no workers) samples draw from
    torch's own random streams.

    Args:
        loader: the data set and how to read it.
        shard: returns which samples this rank reads, of a number of samples.
        seed: the seed of the data.
        shuffle: whether to shuffle where the loader leaves it open.
        seeded: whether each sample is read under its own seed.
    """

    unit = "Samples"
    uneven = False
    keeps_state = False

    def __init__(
        self,
        loader: Loader,
        shard: Callable[[int], Sharding],
        *,
        seed: int,
        shuffle: bool,
        seeded: bool,
    ) -> None:
        self.loader = loader
        self._shard = shard
        self._length = dataset_length(loader)
        self.sharding = shard(self._length)
        self.seed = seed if loader.generator is None else loader.generator.initial_seed()
        self.shuffle = shuffle if loader.shuffle is None else loader.shuffle
        self.seeded = seeded
        self._collate = loader.collate_fn or default_collate
        self._samples = SeededSamples(loader, self.seed, seeded or loader.num_workers > 0)
        self._columns = self._tensor_columns()
        self._lengths = self._read_lengths()
        self._epoch_batches = _EpochBatches()
        self._workers: DataLoader[Any] | None = None

    def _tensor_columns(self) -> tuple[torch.Tensor, ...] | None:
        # One index into a tensor gives the same batch as stacking its rows, a hundred times faster.
        dataset = self.loader.dataset
        plain = type(dataset) is TensorDataset and self._collate is default_collate
        return dataset.tensors if plain and not self.loader.num_workers else None

    def batches_per_epoch(self) -> int | None:
        """Return how many micro-batches this rank takes in an epoch."""
        return self.sharding.batches_left()

    def stride(self) -> int:
        """Return by how much one micro-batch on every rank moves the position."""
        return self.sharding.stride

    def samples_at_once(self) -> int:
        """Return the samples of one micro-batch on all ranks."""
        return self.sharding.stride

    def end(self) -> int:
        """Return the position at the end of an epoch, in samples."""
        return self.sharding.end

    def permutation(self, epoch: int) -> Any:
        """Return the sample indices in the order of ``epoch``."""
        length = self.sharding.length
        if self.loader.weights is not None and self.shuffle:
            indices: Any = weighted_sample(self._weights(), length, seed=self.seed, epoch=epoch)
        else:
            indices = permutation(length, seed=self.seed, epoch=epoch, shuffle=self.shuffle)
        if self._lengths is None:
            return indices
        return group_by_length(indices, self._lengths, self.sharding.stride)

    def _weights(self) -> torch.Tensor:
        weights = self.loader.weights
        assert weights is not None
        usable = bool((weights >= 0).all() and weights.sum() > 0)
        if len(weights) != len(self.loader.dataset) or not usable:
            raise DataError(
                f"Loader(weights=...) holds {len(weights)} weights for {len(self.loader.dataset)} "
                "samples: give one for each, none negative, not all 0"
            )
        return weights

    def _read_lengths(self) -> torch.Tensor | None:
        wanted = self.loader.group_by_length
        dataset = self.loader.dataset
        if wanted is False or not self.shuffle:
            return None
        if isinstance(wanted, (bool, str)):
            key = "input_ids" if wanted is True else wanted
            samples = (dataset[index] for index in range(len(dataset)))
            lengths = [len(s[key]) if isinstance(s, Mapping) else len(s) for s in samples]
        else:
            lengths = list(wanted)
        if len(lengths) != len(dataset):
            raise DataError(
                f"Loader(group_by_length=...) holds {len(lengths)} lengths for {len(dataset)} "
                "samples"
            )
        return torch.tensor(lengths)

    def samples_at(self, epoch: int, start: int, end: int) -> list[int]:
        """Return the indices of the samples between two positions of an epoch, over all ranks."""
        indices = self.permutation(epoch)
        return as_ints(indices[start:end])

    def promised(self) -> int:
        """Return the position at the end of an epoch, which is exact."""
        return self.sharding.end

    def stateful_parts(self) -> list[Any]:
        """Return nothing: reading changes no state."""
        return []

    def open(self, epoch: int, start: int) -> Iterator[WorkItem]:
        """Yield this rank's micro-batches from ``start`` of ``epoch``, in samples.

        A rank may get a dummy batch, of size 0, at the end of the epoch.

        Raises:
            DataError: reading a sample failed; the error names the samples.
        """
        self.begin_epoch(epoch)
        read = self._from_workers if self.loader.num_workers else self._in_process
        return read(epoch, start, self.permutation(epoch))

    def begin_epoch(self, epoch: int) -> None:
        """Announce the epoch to the data set, and look at its length again."""
        announced = announce_epoch(self.loader.dataset, epoch)
        length = dataset_length(self.loader)
        if length != self._length:
            self._length = length
            self.sharding = self._shard(length)
            self._columns = self._tensor_columns()
            self._lengths = self._read_lengths()
            announced = True
        if announced:
            self._workers = None  # kept workers hold the data set as it was when they started

    def _in_process(self, epoch: int, start: int, indices: Any) -> Iterator[WorkItem]:
        columns = self._columns
        sharding = self.sharding
        epoch_end = sharding.end
        stride = sharding.stride
        for position in range(start, epoch_end, stride):
            low, high, size = sharding.slice_at(position)
            if columns is None:
                batch = self.read_one(epoch, indices[low:high])
            else:
                rows = slice(low, high) if isinstance(indices, range) else indices[low:high]
                # Not a comprehension: before Python 3.12 each of those is a call of its own.
                batch = tuple(map(itemgetter(rows), columns))
            end = min(position + stride, epoch_end)
            yield WorkItem(batch, size, end - position, end)

    def _from_workers(self, epoch: int, start: int, indices: Any) -> Iterator[WorkItem]:
        sharding = self.sharding
        positions = range(start, sharding.end, sharding.stride)
        slices = map(sharding.slice_at, positions)  # no list: it would grow with the data
        batches = self.read((epoch, indices[low:high]) for low, high, _ in slices)
        for position, batch in zip(positions, batches):
            size = sharding.slice_at(position)[2]
            end = min(position + sharding.stride, sharding.end)
            yield WorkItem(batch, size, end - position, end)

    def read_one(self, order: int, indices: Any) -> Any:
        """Return the batch of some samples, read in this process.

        Args:
            order: the epoch, or another number that seeds the samples.
            indices: the indices of the samples in the data set.

        Raises:
            DataError: reading a sample failed, or no batch could be made of the samples.
        """
        read = self._samples.read(order, as_ints(indices))
        try:
            return self._collate(read)
        except Exception as error:
            name = type(self.loader.dataset).__name__
            raise collate_error(error, name, read, indices, order) from error

    def read(self, requests: Iterable[tuple[int, Any]]) -> Generator[Any, None, None]:
        """Yield the batch of each request, an order and indices as for ``read_one``.

        Workers read ahead, so they take requests before their batches are asked for.

        Raises:
            DataError: reading failed; the error names the samples.
        """
        if not self.loader.num_workers:
            for order, indices in requests:
                yield self.read_one(order, indices)
            return
        waiting: deque[list[tuple[int, int]]] = deque()

        def keys() -> Iterator[list[tuple[int, int]]]:
            for order, indices in requests:
                waiting.append([(order, index) for index in as_ints(indices)])
                yield waiting[-1]

        if self._workers is None:
            # The generator of its own keeps each epoch from drawing from torch's global stream.
            self._workers = DataLoader(
                self._samples,
                batch_sampler=self._epoch_batches,
                collate_fn=_WorkerCollate(
                    self._collate, type(self.loader.dataset).__name__, self.loader.num_workers
                ),
                generator=torch.Generator(),
                **self.loader.worker_options(),
            )
        self._epoch_batches.keys = keys()
        batches = iter(self._workers)
        while True:
            try:
                batch = next(batches, waiting)
            except Exception as error:
                end_workers(self._workers, batches)
                if not is_worker_failure(error):
                    raise
                ids = ", ".join(str(index) for _, index in waiting[0][:8])
                raise DataError(
                    f"a worker reading {type(self.loader.dataset).__name__} failed at or after the "
                    f"batch of samples {ids}: {error}"
                ) from error
            if batch is waiting:
                return
            waiting.popleft()
            yield batch

    def state(self) -> None:
        """Return None: the position is all that is needed to continue."""

    def end_state(self) -> None:
        """Return None: the next pass needs nothing."""

    def close(self) -> None:
        """End the worker processes."""
        self._workers = None


def as_ints(indices: Any) -> list[int]:
    """Return indices, which are a tensor, a range or a list, as a list."""
    return indices.tolist() if isinstance(indices, torch.Tensor) else [int(i) for i in indices]
