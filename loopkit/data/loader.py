"""Loader, and the source that reads a map-style data set from any position."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import BaseContext
from operator import itemgetter
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset, default_collate

from loopkit import rng
from loopkit.checks import checked_int
from loopkit.data.collate import collate_error
from loopkit.data.sampler import Sharding, WorkItem, group_by_length, permutation, weighted_sample
from loopkit.errors import DataError, LoopkitError, OptionError
from loopkit.keywords import checks_keywords

OUT_OF_ORDER = (
    "batches that come when they are ready have no position to resume from, and their order changes "
    "from run to run: leave in_order out"
)


@checks_keywords
class Loader:
    """A data set, and how to read it in batches.

    It takes the arguments of ``torch.utils.data.DataLoader`` and a few more. What is left None
    depends on the use: training shuffles, evaluation does not.

    Example::

        def train_data(self):
            return Loader(self.texts, num_workers=4, collate_fn=Padded(), group_by_length=True)

    Args:
        dataset: anything with ``len()`` and ``[index]``, or a ``torch.utils.data.IterableDataset``.
        batch_size: samples per batch and device; None takes ``Fit(batch_size=)`` or
            ``eval_batch_size``.
        shuffle: a new order in every epoch.
        num_workers: processes that read ahead; 0 reads in the training process.
        pin_memory: page-locked memory for the copy to a GPU; "auto" pins where there is a GPU.
        drop_last: leave out the last, shorter batch of an epoch.
        prefetch_factor: batches that each worker reads ahead; None takes torch's default.
        persistent_workers: keep the workers between epochs.
        collate_fn: makes a batch of a list of samples; None stacks tensors, numbers and arrays,
            through dicts and tuples.
        columns: for samples that are dicts, the keys to keep.
        group_by_length: put samples of about the same length into a batch. True takes ``len()`` of
            a sample, or of its "input_ids"; a key takes ``len()`` of that entry. A sequence gives
            the length of each sample.
        weights: draw samples with replacement, each with a chance in proportion to its weight;
            [samples].
        length: samples per epoch, where ``weights`` draws them; None takes the data set's length.
        timeout: seconds to wait for a worker before giving up; 0 waits for ever.
        worker_init_fn: called in each worker with its number, before it reads.
        multiprocessing_context: how workers start: "fork", "spawn", "forkserver" or a context;
            None takes the platform's default.
        pin_memory_device: the device for which memory is page-locked, as torch names it.
        generator: its seed decides this loader's order and augmentation, in place of ``data_seed``.
            The position decides the rest, so the state of the generator has no effect.
        in_order: must stay True, since a position means nothing for batches out of order.
        sharded: the IterableDataset gives each rank samples of its own, so ranks may run out at
            different times. Otherwise every rank reads all samples and takes its share of them.

    Raises:
        OptionError: an unknown argument, or a number that is not whole or too small.
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
        persistent_workers: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        columns: Sequence[str] | None = None,
        group_by_length: bool | str | Sequence[int] = False,
        weights: Sequence[float] | torch.Tensor | None = None,
        length: int | None = None,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: str | BaseContext | None = None,
        pin_memory_device: str = "",
        generator: torch.Generator | None = None,
        in_order: bool = True,
        sharded: bool = False,
    ) -> None:
        self.dataset = dataset
        self.batch_size = checked_int(batch_size, "Loader(batch_size=)", or_none=True)
        self.shuffle = shuffle
        self.num_workers = checked_int(num_workers, "Loader(num_workers=)", at_least=0)
        self.pin_memory = pin_memory
        self.drop_last = drop_last
        self.prefetch_factor = checked_int(
            prefetch_factor, "Loader(prefetch_factor=)", or_none=True
        )
        self.persistent_workers = persistent_workers
        self.collate_fn = collate_fn
        self.columns = None if columns is None else tuple(columns)
        self.group_by_length = group_by_length
        self.weights = None if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        self.length = checked_int(length, "Loader(length=)", or_none=True)
        self.timeout = timeout
        self.worker_init_fn = worker_init_fn
        self.multiprocessing_context = multiprocessing_context
        self.pin_memory_device = pin_memory_device
        self.generator = generator
        self.in_order = in_order
        if not in_order:
            raise OptionError(f"Loader(in_order=False): {OUT_OF_ORDER}")
        self.sharded = sharded

    def worker_options(self) -> dict[str, Any]:
        """Return the arguments of ``torch.utils.data.DataLoader`` that concern its workers."""
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
        if self.pin_memory_device:
            options["pin_memory_device"] = self.pin_memory_device
        return options


class _SeededSamples(Dataset[Any]):
    """The data set by (epoch, index). Each sample has its own seed, the same in every worker."""

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
            raise DataError(
                f"{type(self.dataset).__name__}[{index}] failed in epoch {epoch}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def __getitems__(self, keys: list[tuple[int, int]]) -> _Samples:
        """Return the samples of a batch for the worker's collate function, which names them."""
        samples = _Samples(self[key] for key in keys)
        samples.keys = keys
        return samples


class _Samples(list[Any]):
    """The samples of one batch in a worker process, with their keys."""

    keys: list[tuple[int, int]]


class _WorkerCollate:
    """The collate function in a worker process; its errors name the samples."""

    def __init__(self, collate: Callable[[list[Any]], Any], name: str) -> None:
        self.collate = collate
        self.name = name

    def __call__(self, samples: Any) -> Any:
        try:
            return self.collate(list(samples))
        except Exception as error:
            epoch = samples.keys[0][0]
            indices = [index for _, index in samples.keys]
            raise collate_error(error, self.name, samples, indices, epoch) from error


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
        self._samples = _SeededSamples(loader, self.seed, seeded or loader.num_workers > 0)
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
        return [int(index) for index in indices[start:end]]

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
        self._begin_epoch(epoch)
        read = self._from_workers if self.loader.num_workers else self._in_process
        return read(epoch, start, self.permutation(epoch))

    def _begin_epoch(self, epoch: int) -> None:
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
        collate = self._collate
        samples = self._samples
        sharding = self.sharding
        epoch_end = sharding.end
        stride = sharding.stride
        for position in range(start, epoch_end, stride):
            low, high, size = sharding.slice_at(position)
            if columns is None:
                read = [samples[epoch, int(index)] for index in indices[low:high]]
                try:
                    batch = collate(read)
                except Exception as error:
                    name, of_batch = type(self.loader.dataset).__name__, indices[low:high]
                    raise collate_error(error, name, read, of_batch, epoch) from error
            else:
                rows = slice(low, high) if isinstance(indices, range) else indices[low:high]
                # Not a comprehension: before Python 3.12 each of those is a call of its own.
                batch = tuple(map(itemgetter(rows), columns))
            end = min(position + stride, epoch_end)
            yield WorkItem(batch, size, end - position, end)

    def _from_workers(self, epoch: int, start: int, indices: Any) -> Iterator[WorkItem]:
        sharding = self.sharding
        if self._workers is None:
            # The generator of its own keeps each epoch from drawing from torch's global stream.
            self._workers = DataLoader(
                self._samples,
                batch_sampler=self._epoch_batches,
                collate_fn=_WorkerCollate(self._collate, type(self.loader.dataset).__name__),
                generator=torch.Generator(),
                **self.loader.worker_options(),
            )
        positions = range(start, sharding.end, sharding.stride)
        slices = [sharding.slice_at(position) for position in positions]
        self._epoch_batches.keys = (
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
                raise DataError(
                    f"a worker reading {type(self.loader.dataset).__name__} failed at or after the "
                    f"batch of samples {ids}: {error}"
                ) from error
            end = min(position + sharding.stride, sharding.end)
            yield WorkItem(batch, size, end - position, end)

    def state(self) -> None:
        """Return None: the position is all that is needed to continue."""

    def end_state(self) -> None:
        """Return None: the next pass needs nothing."""

    def close(self) -> None:
        """End the worker processes."""
        self._workers = None


def dataset_length(loader: Loader) -> int:
    """Return how many samples an epoch reads: those of the data set, or as many as are drawn.

    Raises:
        TypeError: the data set has no length.
    """
    length = len(loader.dataset)
    if loader.weights is not None and loader.length is not None and length:
        length = loader.length
    return length


def announce_epoch(data: Any, epoch: int) -> bool:
    """Call ``set_epoch`` on data, and on the samplers and data sets inside of it.

    Returns:
        Whether any of them has ``set_epoch``.
    """
    waiting, seen, found = [data], set[int](), False
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if callable(getattr(part, "set_epoch", None)):
            part.set_epoch(epoch)
            found = True
        waiting += [getattr(part, name, None) for name in ("batch_sampler", "sampler", "dataset")]
        several = getattr(part, "datasets", None)
        waiting += several if isinstance(several, (list, tuple)) else []
    return found


def mixed(
    datasets: Mapping[str, Any],
    shares: Mapping[str, float],
    *,
    length: int | None = None,
    **options: Any,
) -> Loader:
    """Return a Loader over several data sets, each with its share of the samples.

    Args:
        datasets: map-style data sets by name.
        shares: the share of each data set by name, in proportion to the others. A data set with a
            share of 0 is not read.
        length: samples per epoch; None takes as many as the data sets hold together.
        options: further arguments of ``Loader``.

    Raises:
        OptionError: a data set without a share, or a share without a data set.
    """
    if datasets.keys() != shares.keys():
        raise OptionError(
            f"mixed(): the data sets are {', '.join(datasets)}, the shares are for "
            f"{', '.join(shares)}"
        )
    per_sample = [
        torch.full((len(dataset),), shares[name] / max(1, len(dataset)))
        for name, dataset in datasets.items()
    ]
    joined: ConcatDataset[Any] = ConcatDataset(datasets.values())
    return Loader(joined, weights=torch.cat(per_sample), length=length, **options)
