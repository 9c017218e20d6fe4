"""Seeds of samples: none where reading draws nothing, and each sample's own where it draws."""

from __future__ import annotations

import random
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import TensorDataset

from loopkit import rng
from loopkit.data import Loader
from loopkit.data.samples import SeededSamples
from loopkit.errors import DataError

SEED, EPOCH = 7, 2


class Plain:
    """Squares; it notes what is read."""

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> float:
        self.reads.append(index)
        return float(index * index)


class AtOnce(Plain):
    """Squares that can be read together, as in a table."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[float]:
        self.batches.append(indices)
        return [float(index * index) for index in indices]


class Draws(Plain):
    """Samples of which those from ``first`` on draw from one of the generators."""

    def __init__(self, kind: str, first: int = 0) -> None:
        super().__init__()
        self.kind, self.first = kind, first

    def __getitem__(self, index: int) -> float:
        value = super().__getitem__(index)
        if index < self.first:
            return value
        draws = {
            "torch": lambda: float(torch.rand(())),
            "numpy": numpy.random.rand,
            "python": random.random,
        }
        return value + float(draws[self.kind]())


def reader(dataset: Plain, seeded: bool = True) -> SeededSamples:
    return SeededSamples(Loader(dataset), SEED, seeded)


def alone(dataset: Plain, index: int) -> float:
    """The sample under its own seed, with nothing read before it."""
    rng.seed_all(rng.mix(SEED, EPOCH, index, 1))
    return dataset[index]


def state() -> list[float]:
    """What the generators give next."""
    return [float(torch.rand(())), random.random(), float(numpy.random.rand())]


def check_batches(data: Plain, wanted: Plain) -> None:
    """Check eight batches, and what the generators give after each, against samples read alone."""
    read = reader(data)
    for low in range(0, 80, 10):
        batch = list(range(low, low + 10))
        assert read.read(EPOCH, batch) == [alone(wanted, index) for index in batch]
        after = state()
        alone(wanted, batch[-1])
        assert state() == after


def test_data_that_draws_nothing_is_read_at_once_and_leaves_the_generators_as_seeds_would():
    data, plain = AtOnce(), Plain()
    at_once, one_by_one = reader(data), reader(plain)
    for batch in (list(range(16)), list(range(40, 60)), [3, 9]):
        wanted = [float(i * i) for i in batch]
        assert at_once.read(EPOCH, batch) == wanted
        first = state()
        assert one_by_one.read(EPOCH, batch) == wanted
        assert state() == first
        alone(Plain(), batch[-1])
        assert state() == first
    assert data.batches == [list(range(4, 16)), list(range(40, 60))]
    assert plain.reads == [*range(16), *range(40, 60), 3, 9], "each once"


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
@pytest.mark.parametrize("first", [0, 2, 10, 30, 55])
def test_samples_that_draw_are_those_of_their_own_seeds_whenever_the_first_of_them_comes(
    kind, first
):
    check_batches(Draws(kind, first), Draws(kind, first))


class DrawsMore(Plain):
    """Samples that draw from torch, from ``first`` on from NumPy too, and later from Python."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def __getitem__(self, index: int) -> float:
        value = super().__getitem__(index) + float(torch.rand(()))
        if index >= self.first:
            value += numpy.random.rand()
        if index >= self.first + 13:
            value += random.random()
        return value


@pytest.mark.parametrize("first", [0, 3, 4, 25, 39])
def test_another_generator_is_seeded_from_the_batch_on_that_draws_from_it(first):
    check_batches(DrawsMore(first), DrawsMore(first))


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_each_sample_is_read_under_the_seed_of_the_generators_that_it_draws_from(kind, monkeypatch):
    data = Draws(kind)
    read = reader(data)
    read.read(EPOCH, list(range(10)))
    data.reads.clear()
    seeded = []
    original = rng.seed
    monkeypatch.setattr(
        rng, "seed", lambda value, names: (seeded.append(sorted(names)), original(value, names))
    )
    read.read(EPOCH, list(range(10, 20)))
    others = sorted({"torch", "numpy", "python"} - {kind})
    assert seeded == [[kind]] * 10 + [others], "each sample's, and once what the batch leaves"
    assert data.reads == [*range(10, 20)], "each once"


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_a_draw_is_noticed_and_a_restored_state_is_none(kind):
    draws: Any = {
        "torch": lambda: torch.rand(1),
        "numpy": numpy.random.rand,
        "python": lambda: random.getrandbits(1),
    }[kind]
    for times in (1, 2, 312, 624, 1248):  # a Mersenne Twister makes 624 words at a time
        rng.watch(rng.GENERATORS)
        for _ in range(times):
            draws()
        assert rng.drawn(rng.GENERATORS) == {kind}, times
    rng.watch(rng.GENERATORS)
    with rng.preserved():
        draws()
    assert not rng.drawn(rng.GENERATORS)
    rng.watch(rng.GENERATORS)
    assert not rng.drawn(rng.GENERATORS)
    others = [name for name in rng.GENERATORS if name != kind]
    rng.watch(others)
    draws()
    assert not rng.drawn(others)


@pytest.mark.parametrize("kind", [list, tuple, TensorDataset])
def test_data_that_is_only_indexed_leaves_the_generators_as_seeds_would(kind, monkeypatch):
    values = torch.arange(40.0)
    data = TensorDataset(values) if kind is TensorDataset else kind(values.tolist())
    read = reader(data)
    monkeypatch.setattr(rng, "watch", None)
    assert [float(torch.as_tensor(s).squeeze()) for s in read.read(EPOCH, range(9))] == [*range(9)]
    after = state()
    alone(Plain(), 8)
    assert state() == after


def test_what_is_read_does_not_depend_on_the_batches():
    wanted = reader(Draws("numpy", 37)).read(EPOCH, list(range(60)))
    read, found = reader(Draws("numpy", 37)), []
    for low, high in ((0, 1), (1, 3), (3, 30), (30, 31), (31, 60)):
        found += read.read(EPOCH, list(range(low, high)))
    assert found == wanted


def test_without_seeds_the_streams_are_those_of_a_loop_by_hand():
    torch.manual_seed(0)
    found = reader(Draws("torch"), seeded=False).read(EPOCH, [5, 6])
    torch.manual_seed(0)
    data = Draws("torch")
    assert found == [data[5], data[6]]


class Broken(AtOnce):
    """Reads sample 20 neither alone nor with others; or, ``together``, fails with others alone."""

    def __init__(self, together: bool) -> None:
        super().__init__()
        self.together = together

    def __getitem__(self, index: int) -> float:
        if index == 20 and not self.together:
            raise ValueError("bits rot")
        return super().__getitem__(index)

    def __getitems__(self, indices: list[int]) -> list[float]:
        if 20 in indices:
            raise ValueError("bits rot")
        return super().__getitems__(indices)


def test_an_error_of_reading_at_once_names_the_sample_or_else_the_batch():
    for together, names in (
        (False, r"Broken\[20\] failed in epoch 2"),
        (True, "one by one: ValueError"),
    ):
        read = reader(Broken(together))
        read.read(EPOCH, list(range(10)))
        with pytest.raises(DataError, match=names):
            read.read(EPOCH, list(range(15, 25)))


def test_a_batch_of_another_length_is_an_error():
    class Short(AtOnce):
        def __getitems__(self, indices):
            return super().__getitems__(indices)[1:]

    with pytest.raises(DataError, match="returned 5 samples for 6 indices"):
        reader(Short()).read(EPOCH, list(range(10)))


def test_a_tensor_dataset_gives_its_rows_and_names_one_that_is_missing():
    data = TensorDataset(torch.arange(12.0).view(6, 2), torch.arange(6))
    found = reader(data).read(EPOCH, [4, 1, 5])
    for (row, label), index in zip(found, (4, 1, 5)):
        assert torch.equal(row, data[index][0])
        assert torch.equal(label, data[index][1])
        assert row.data_ptr() == data[index][0].data_ptr()  # no copy, as TensorDataset gives it
    read = reader(data)
    data.tensors = (data.tensors[0], data.tensors[1][:5])
    with pytest.raises(DataError, match=r"TensorDataset\[5\] failed in epoch 2"):
        read.read(EPOCH, [4, 1, 5])
