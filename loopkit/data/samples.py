"""Reads samples of a map-style data set, each as if under its own seed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from torch.utils.data import Dataset, TensorDataset

from loopkit import rng
from loopkit.data.loader import Loader
from loopkit.errors import DataError, LoopkitError

_FEW = 4
"""Below so many samples, seeding each costs less than a look at the generators."""


class Samples(list[Any]):
    """The samples of one batch, with their keys."""

    keys: list[tuple[int, int]]


class SeededSamples(Dataset[Any]):
    """The data set by (epoch, index). Each sample has its own seed, the same in every worker.

    Seeding three generators can cost more than reading a sample. So each sample is read under the
    seeds of those that the data set draws from. Where it draws from none, a batch is read with its
    ``__getitems__``, if it has one. The generators tell which of them it drew from: what each gives
    next is compared. Where torch or Python only indexes, nothing is compared. When a data set draws
    from another generator, that batch is read again, each sample under all seeds.

    Args:
        loader: the data set, and which columns to keep.
        seed: the seed of the data.
        seeded: False reads from the random streams as they are.
    """

    def __init__(self, loader: Loader, seed: int, seeded: bool) -> None:
        self.dataset = loader.dataset
        self.columns = loader.columns
        self.seed = seed
        self.seeded = seeded
        self._drawn: set[str] | None = None  # generators; None: nothing was read yet
        self._only_indexes = type(loader.dataset) in (TensorDataset, list, tuple, range)
        self._has_tensors = type(loader.dataset) is TensorDataset and loader.columns is None
        self._reads_batches = callable(getattr(loader.dataset, "__getitems__", None))

    def __getitem__(self, key: tuple[int, int]) -> Any:
        """Return one sample, under its seed.

        Raises:
            DataError: reading failed; the error names the sample.
        """
        epoch, index = key
        return self._one_by_one(epoch, [index], rng.GENERATORS if self.seeded else ())[0]

    def __getitems__(self, keys: list[tuple[int, int]]) -> Samples:
        """Return the samples of a batch for the worker's collate function, which names them."""
        samples = Samples(self.read(keys[0][0], [index for _, index in keys]))
        samples.keys = keys
        return samples

    def read(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        """Return the samples of a batch. It leaves the generators as the last sample's seed does.

        Raises:
            DataError: reading failed; the error names the sample.
        """
        if not self.seeded:
            return self._at_once(epoch, indices)
        if self._only_indexes and indices:
            samples = self._at_once(epoch, indices)
            self._seed(epoch, indices[-1])
            return samples
        if self._drawn is None and indices:
            return self._first(epoch, indices)
        drawn = self._drawn or set()
        others = [name for name in rng.GENERATORS if name not in drawn]
        if others and len(indices) >= _FEW:
            rng.watch(others)
            samples = (
                self._one_by_one(epoch, indices, drawn) if drawn else self._at_once(epoch, indices)
            )
            found = rng.drawn(others)
            if not found:
                self._seed(epoch, indices[-1], others)
                return samples
            self._drawn = drawn | found
        return self._one_by_one(epoch, indices, rng.GENERATORS)

    def _first(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        """Read a first batch: a few samples one by one, to see which generators they draw from."""
        samples: list[Any] = []
        drawn: set[str] = set()
        for index in indices[:_FEW]:
            self._seed(epoch, index)
            fresh = rng.get_state()
            samples += self._one_by_one(epoch, [index])
            drawn |= rng.changed(fresh)
        self._drawn = drawn
        return samples + self.read(epoch, indices[_FEW:])

    def _at_once(self, epoch: int, indices: Sequence[int]) -> list[Any]:
        if self._has_tensors:
            with suppress(Exception):  # read one by one, it names the sample
                # As TensorDataset does, but without two calls of Python for each sample.
                tensors = self.dataset.tensors
                return list(zip(*[[rows[index] for index in indices] for rows in tensors]))
        if not self._reads_batches:
            return self._one_by_one(epoch, indices)
        name = type(self.dataset).__name__
        try:
            samples = self.dataset.__getitems__(list(indices))
        except LoopkitError:
            raise
        except Exception as error:
            self._one_by_one(epoch, indices)  # so that the error names the sample
            shown = ", ".join(str(index) for index in indices[:8])
            raise DataError(
                f"{name}.__getitems__ failed in epoch {epoch} for samples {shown}, which {name} "
                f"gives one by one: {type(error).__name__}: {error}"
            ) from error
        if len(samples) != len(indices):
            raise DataError(
                f"{name}.__getitems__ returned {len(samples)} samples for {len(indices)} indices"
            )
        return samples if self.columns is None else [_kept(s, self.columns) for s in samples]

    def _one_by_one(
        self, epoch: int, indices: Sequence[int], names: Collection[str] = ()
    ) -> list[Any]:
        """Read samples, each under its seed of the named generators."""
        dataset, columns, index = self.dataset, self.columns, -1
        samples = []
        try:
            for index in indices:
                if names:
                    self._seed(epoch, index, names)
                sample = dataset[index]
                samples.append(sample if columns is None else _kept(sample, columns))
            return samples
        except LoopkitError:
            raise
        except Exception as error:
            raise DataError(
                f"{type(dataset).__name__}[{index}] failed in epoch {epoch}: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _seed(self, epoch: int, index: int, names: Collection[str] = rng.GENERATORS) -> None:
        rng.seed(rng.mix(self.seed, epoch, index, 1), names)


def _kept(sample: Any, columns: Sequence[str]) -> dict[str, Any]:
    return {name: sample[name] for name in columns}
