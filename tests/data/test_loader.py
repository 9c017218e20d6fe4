"""Loader: pure positions, grouping by length, weights, mixtures, padding, columns, sizes that do
not divide.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from loopkit import Loader
from loopkit.data import Padded, mixed
from loopkit.data.indexed import IndexedSource
from loopkit.data.sampler import Sharding, permutation
from loopkit.data.sources import DataConfig, open_source
from loopkit.errors import DataError, LoopkitWarning, OptionError
from tests.support import Noisy, Tiny, digest, points, quiet


def source(data: Any, **reading: Any) -> Any:
    how = {"batch_size": 4, "shuffle": True, "seed": 0, "seeded": True, **reading}
    return open_source(data, DataConfig(**how), "data")


def ids(data: Any, epoch: int = 0, start: int = 0, **reading: Any) -> list[list[int]]:
    """The samples of each batch, of a data set that holds its own indices; none in dummy batches."""
    return [
        batch[0].tolist() if size else []
        for batch, size, *_ in source(data, **reading).open(epoch, start)
    ]


def numbered(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


@pytest.mark.parametrize("count", [1, 7, 8, 30])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_take_every_sample_once_in_one_global_order(count, world):
    whole = [i for batch in ids(numbered(count), batch_size=4) for i in batch]
    assert sorted(whole) == list(range(count))
    parts = [
        ids(numbered(count), batch_size=4, rank=rank, num_replicas=world) for rank in range(world)
    ]
    dealt = [i for turn in zip(*parts) for batch in turn for i in batch]
    assert dealt == whole


def test_any_position_opens_at_once_and_gives_the_same_batches():
    class Counted(TensorDataset):
        reads = 0

        def __getitem__(self, index: int) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    data = Counted(torch.arange(10_000))
    opened = source(data)
    whole = list(opened.open(3, 0))[2_000:2_003]
    data.reads = 0
    rest = [next(batches) for batches in [opened.open(3, 8_000)] for _ in range(3)]
    assert [b[0].tolist() for b, *_ in rest] == [b[0].tolist() for b, *_ in whole]
    assert data.reads == 12


def test_epochs_differ_and_seeds_differ():
    orders = [
        tuple(permutation(100, seed=s, epoch=e, shuffle=True).tolist())
        for s in range(3)
        for e in range(3)
    ]
    assert len(set(orders)) == 9
    assert list(permutation(5, seed=0, epoch=0, shuffle=False)) == [0, 1, 2, 3, 4]


def test_drop_last_and_sizes_that_do_not_divide():
    assert [len(b) for b in ids(numbered(10))] == [4, 4, 2]
    assert [len(b) for b in ids(Loader(numbered(10), drop_last=True))] == [4, 4]
    assert Sharding(10, 4, drop_last=True).end == 8


class Words(torch.utils.data.Dataset):
    """Samples of every length from 1 to 40, as token lists."""

    def __len__(self) -> int:
        return 800

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "input_ids": list(range(1, 2 + (index * 7) % 40)),
            "labels": [index] * (1 + (index * 7) % 40),
            "id": index,
        }


def padding(loader: Loader) -> float:
    batches = [batch for batch, *_ in source(loader).open(0, 0)]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return 1 - tokens / sum(batch["input_ids"].numel() for batch in batches)


@pytest.mark.parametrize(
    "lengths", [True, "labels", [1 + (i * 7) % 40 for i in range(800)]], ids=["ids", "key", "list"]
)
def test_grouping_by_length_saves_padding_and_still_takes_each_sample_once(lengths):
    loader = Loader(Words(), collate_fn=Padded({"labels": -100}), group_by_length=lengths)
    seen = [int(i) for batch, *_ in source(loader).open(1, 0) for i in batch["id"]]
    assert sorted(seen) == list(range(800))
    assert padding(loader) < 0.05 < 0.3 < padding(Loader(Words(), collate_fn=Padded()))
    first = next(iter(source(loader).open(0, 0)))[0]
    assert first["input_ids"].shape[1] == 40, "the longest comes first"


def test_weights_draw_in_proportion_and_resume_from_any_position():
    weights = [1.0] * 50 + [3.0] * 50 + [0.0] * 100
    loader = Loader(numbered(200), weights=weights, length=4000)
    seen = [i for batch in ids(loader) for i in batch]
    assert len(seen) == 4000
    assert max(seen) < 100
    assert sum(i >= 50 for i in seen) / 4000 == pytest.approx(0.75, abs=0.03)
    assert [i for batch in ids(loader, start=400) for i in batch] == seen[400:]


def test_a_mixture_keeps_its_shares_whatever_the_sizes():
    small, large = TensorDataset(torch.zeros(10)), TensorDataset(torch.ones(1000))
    loader = mixed({"small": small, "large": large}, {"small": 1, "large": 3}, length=4000)
    seen = torch.cat([batch[0] for batch, *_ in source(loader).open(0, 0)])
    assert float(seen.mean()) == pytest.approx(0.75, abs=0.03)
    with pytest.raises(
        OptionError, match="the data sets are small, large, the shares are for small"
    ):
        mixed({"small": small, "large": large}, {"small": 1})


def test_padding_by_key_side_and_multiple():
    samples = [
        {"input_ids": [1, 2, 3], "labels": [5, 6, 7], "y": 1.5},
        {"input_ids": [4], "labels": [8], "y": 2.5},
    ]
    batch = Padded({"labels": -100}, multiple_of=4)(samples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, -100], [8, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert batch["y"].tolist() == [1.5, 2.5]
    assert Padded(padding_side="left")(samples)["input_ids"].tolist() == [[1, 2, 3], [0, 0, 4]]
    with pytest.raises(DataError, match="dicts with the same keys"):
        Padded()([samples[0], {"input_ids": [1]}])


def test_columns_keep_what_is_named():
    loader = Loader(Words(), columns=["id"], batch_size=2)
    assert list(next(iter(source(loader).open(0, 0)))[0]) == ["id"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Loader(points(5), num_workers=-1), "Loader(num_workers=-1)"),
        (lambda: Loader(points(5), batch_size=0), "Loader(batch_size=0)"),
        (
            lambda: Padded(padding_side="middle"),
            "Padded(padding_side='middle') is not known: give one of 'right', 'left'",
        ),
    ],
)
def test_bad_settings_are_named(make, text):
    with pytest.raises(OptionError, match=re.escape(text)):
        make()


@pytest.mark.parametrize(
    ("loader", "text"),
    [
        (lambda: Loader(points(5), weights=[1.0]), "holds 1 weights for 5 samples"),
        (lambda: Loader(points(2), weights=[0.0, 0.0]), "not all 0"),
        (lambda: Loader(points(5), group_by_length=[1, 2]), "holds 2 lengths for 5 samples"),
    ],
)
def test_settings_that_do_not_fit_the_data_are_named(loader, text):
    with pytest.raises(DataError, match=re.escape(text)):
        list(source(loader()).open(0, 0))


def test_augmentation_does_not_depend_on_workers_batch_size_or_ranks():
    def read(**how: Any) -> dict[tuple[float, ...], None]:
        workers = how.pop("num_workers", 0)
        batches = [b for b, *_ in source(Loader(Noisy(24), num_workers=workers), **how).open(2, 0)]
        return {tuple(row.tolist()) for x, _ in batches for row in x}

    plain = read()
    assert plain == read(num_workers=2) == read(batch_size=7)
    assert plain == read(rank=0, num_replicas=2) | read(rank=1, num_replicas=2)


def test_loader_takes_dataloaders_own_names():
    own = set(inspect.signature(DataLoader).parameters)
    positions = {"sampler", "batch_sampler"}  # a DataLoader with its own is read as it is
    assert own - positions <= set(inspect.signature(Loader).parameters)


def test_workers_start_as_asked_for():
    def read(**how: Any) -> list[Any]:
        loader = Loader(numbered(8), batch_size=4, num_workers=1, **how)
        return [batch[0].tolist() for batch, *_ in source(loader).open(0, 0)]

    assert read(multiprocessing_context="spawn", prefetch_factor=None) == read()
    with pytest.raises(ValueError, match="multiprocessing_context"):
        read(multiprocessing_context="thread")


def test_a_plain_dataloader_is_taken_apart_and_others_are_read_as_they_are():
    assert isinstance(source(DataLoader(points(8), 4, shuffle=True)), IndexedSource)
    spawning = DataLoader(points(8), 4, num_workers=1, multiprocessing_context="spawn")
    assert source(spawning).loader.worker_options()["multiprocessing_context"] is not None
    weighted = torch.utils.data.WeightedRandomSampler([1.0] * 8, 8)
    assert not isinstance(source(DataLoader(points(8), 4, sampler=weighted)), IndexedSource)
    assert not isinstance(
        source(DataLoader(points(8), 4, shuffle=True), seeded=False), IndexedSource
    )


def name_worker(worker: int) -> None:
    raise AssertionError("no worker is started here")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("multiprocessing_context", "spawn"),
        ("multiprocessing_context", "forkserver"),
        ("timeout", 7),
        ("worker_init_fn", name_worker),
        ("persistent_workers", True),
        ("prefetch_factor", 5),
        ("pin_memory_device", "cuda"),
        ("drop_last", True),
        ("collate_fn", list),
    ],
)
def test_every_setting_of_a_dataloader_is_kept(setting, value, training):
    given = DataLoader(numbered(8), 4, num_workers=1, shuffle=training, **{setting: value})
    loader = source(given, shuffle=training).loader
    assert loader.shuffle is training
    assert (loader.worker_options() | vars(loader))[setting] == getattr(given, setting)


def test_the_seed_of_a_generator_decides_the_order():
    def order(own: int | None, **how: Any) -> Any:
        generator = None if own is None else torch.Generator().manual_seed(own)
        return ids(DataLoader(numbered(16), 4, shuffle=True, generator=generator), **how)

    assert order(1) == order(1, seed=9) != order(2)
    assert order(None) != order(None, seed=9)
    assert order(1, epoch=1) != order(1)
    sampler = torch.utils.data.RandomSampler(numbered(16), generator=torch.Generator())
    assert ids(DataLoader(numbered(16), 4, sampler=sampler)) != order(None)


def test_batches_out_of_order_are_refused():
    with pytest.raises(DataError, match="in_order=False: batches that come when they are ready"):
        source(DataLoader(numbered(8), 4, num_workers=2, in_order=False))
    with pytest.raises(OptionError, match=r"Loader\(in_order=False\): batches"):
        Loader(numbered(8), in_order=False)
    assert ids(DataLoader(numbered(8), 4, in_order=False)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_dataloader_with_a_setting_of_a_later_torch_is_read_as_it_is(monkeypatch):
    given = DataLoader(numbered(8), 4)
    now = inspect.signature(DataLoader)
    extra = inspect.Parameter("reads_twice", inspect.Parameter.KEYWORD_ONLY, default=False)
    later = now.replace(parameters=[*now.parameters.values(), extra])
    monkeypatch.setattr(DataLoader, "__signature__", later, raising=False)
    assert isinstance(source(given), IndexedSource)
    given.reads_twice = True
    assert not isinstance(source(given), IndexedSource)


class Faulty(torch.utils.data.Dataset):
    """Its sample 7 is not like the others."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        sample = {"x": torch.ones(3), "y": 1}
        if index != 7:
            return sample
        return {
            "None": None,
            "key": {"x": torch.ones(3)},
            "shape": {**sample, "x": torch.ones(2)},
            "type": torch.ones(3),
        }[self.how]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("None", "Faulty[7] is None, where Faulty[4] is a dict. The collate function says: "),
        ("key", "Faulty[7] has the keys x, where Faulty[4] has the keys x, y. "),
        ("shape", "Faulty[7] has x of shape [2], y int, where Faulty[4] has x of shape [3], y int"),
        ("type", "Faulty[7] is a Tensor, where Faulty[4] is a dict"),
    ],
)
def test_a_sample_that_fits_no_batch_is_named(how, text, workers):
    with pytest.raises(DataError, match=re.escape(text)) as caught:
        list(source(Loader(Faulty(how), shuffle=False, num_workers=workers)).open(0, 0))
    assert "no batch could be made of the samples 4, 5, 6, 7 of Faulty in epoch 0" in str(
        caught.value
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("None", "sample 3 of them is None, where sample 0"),
        ("key", "sample 3 of them has the keys x,"),
    ],
)
def test_a_streamed_sample_that_fits_no_batch_is_named_by_its_place(how, text, workers):
    class Streamed(IterableDataset):
        def __iter__(self) -> Any:
            return (Faulty(how)[index] for index in range(12))

    with pytest.raises(DataError, match=text) as caught:
        list(source(Loader(Streamed(), num_workers=workers)).open(0, 0))
    assert "no batch could be made of 4 samples in a row of Streamed." in str(caught.value)


class Halves(torch.utils.data.DistributedSampler):
    """A sampler of a user's own that knows the ranks."""


@pytest.mark.parametrize("batched", [False, True])
def test_a_sampler_that_deals_to_ranks_itself_loses_no_sample(batched):
    def read(rank: int, of: int, ranks: int = 2) -> list[list[int]]:
        sampler: Any = Halves(numbered(24), ranks, rank, shuffle=False)
        how: Any = {"sampler": sampler, "batch_size": 4}
        if batched:
            how = {"batch_sampler": torch.utils.data.BatchSampler(sampler, 4, False)}
        return ids(DataLoader(numbered(24), **how), rank=rank, num_replicas=of)

    seen = [i for rank in range(2) for batch in read(rank, 2) for i in batch]
    assert sorted(seen) == list(range(24))
    with pytest.raises(DataError, match="a Halves for rank 0 of 2, and this is rank 0 of 1: make"):
        read(0, 1)
    assert len(read(0, 1, ranks=1)) == 6


class Batched(IterableDataset):
    """Yields batches of its own, or samples that are long."""

    def __init__(self, rows: int, one: bool = False) -> None:
        self.rows, self.one = rows, one

    def __iter__(self) -> Any:
        x = torch.ones(self.rows, 8)
        return iter([x if self.one else (x, x[:, 0].long())] * 8)


def test_batches_that_would_be_batched_again_are_reported():
    with pytest.warns(
        LoopkitWarning, match=r"Batched yields tensors .* DataLoader\(dataset, batch_s"
    ):
        list(source(Batched(4)).open(0, 0))
    kept = list(source(DataLoader(Batched(4), batch_size=None)).open(0, 0))
    assert [(len(batch[0]), size) for batch, size, *_ in kept] == [(4, 4)] * 8


@pytest.mark.parametrize("data", [Batched(5), Batched(4, one=True)])
def test_samples_are_batched_without_a_word(data, recwarn):
    assert [size for _, size, *_ in source(data).open(0, 0)] == [4, 4]
    assert not [w for w in recwarn if w.category is LoopkitWarning]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_function_that_fails_names_the_samples(workers):
    with pytest.raises(
        DataError, match=r"samples 8, 9 of .* in epoch 2\. The .*: ZeroDivisionError"
    ):
        loader = Loader(numbered(10), shuffle=False, num_workers=workers, collate_fn=fails)
        list(source(loader).open(2, 0))


def fails(samples: list[Any]) -> Any:
    return 1 / (len(samples) - 2)


def test_iterable_data_trains_in_epochs_of_its_own_length():
    class Lines(IterableDataset):
        def __iter__(self):
            yield from (points(10)[i] for i in range(10))

    task = Tiny()
    task.train_data = Lines
    task.optimizers = lambda: torch.optim.SGD(task.parameters(), lr=0.1)
    ends = []
    fit = quiet(epochs=2, batch_size=4)
    fit.on("epoch_end", lambda run: ends.append(run.progress.step))
    assert fit.run(task).step == 6
    assert ends == [3, 6]


def test_global_batch_size_keeps_the_maths_whatever_the_batch_size():
    weights = []
    for size in (4, 8, 16):
        task = Tiny(count=64, dropout=0.0)
        assert (
            quiet(batch_size=size, global_batch_size=16, precision="fp64", eval_every="never")
            .run(task)
            .step
            == 4
        )
        weights.append(task.net[0].weight.detach().clone())
    assert digest({"w": weights[0]})
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0], rtol=0, atol=1e-12)
    with pytest.raises(
        OptionError, match="global_batch_size=20 is not a multiple of the 8 samples"
    ):
        quiet(batch_size=8, global_batch_size=20).run(Tiny())


class _Rows(IterableDataset):
    def __iter__(self):
        return iter(points(48))

    def __len__(self):
        return 48


@pytest.mark.parametrize(
    ("data", "steps"),
    [
        (lambda: Loader(_Rows(), batch_size=4), 3),
        (lambda: DataLoader(_Rows(), batch_size=8), 3),
        (lambda: DataLoader(points(48), batch_size=4, sampler=list(range(48))), 3),
        (lambda: _Rows(), 3),
        (lambda: list(DataLoader(points(48), 4)), None),
        (lambda: (batch for batch in DataLoader(points(48), 4)), None),
        (lambda: DataLoader(points(48), batch_sampler=[[0, 1], [2, 3]]), None),
    ],
)
def test_global_batch_size_counts_the_samples_of_every_kind_of_data(data, steps):
    task = Tiny()
    task.train_data = data
    fit = quiet(batch_size=2, global_batch_size=16, eval_every="never", epochs=1)
    if steps is None:
        with pytest.raises(OptionError, match=r"gives batches of its own: give accumulate="):
            fit.run(task)
    else:
        assert fit.run(task).step == steps
