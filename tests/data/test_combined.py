"""Several data sets side by side: modes, orders, ranks, resumes, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from loopkit import Loader
from loopkit.data import CombinedLoader
from loopkit.data.sources import DataConfig, open_source
from loopkit.errors import DataError, OptionError
from tests.support import Tiny, points, quiet


def numbered(first: int, end: int) -> TensorDataset:
    return TensorDataset(torch.arange(first, end))


class Lines(IterableDataset):
    def __init__(self, first: int, end: int) -> None:
        self.first, self.end = first, end

    def __iter__(self) -> Any:
        return ((torch.tensor(i),) for i in range(self.first, self.end))


class Stateful(Lines):
    """Continues where its state says, and begins each pass at another sample."""

    at = passes = 0

    def __iter__(self) -> Any:
        count = self.end - self.first
        while self.at < count:
            self.at += 1
            yield (torch.tensor(self.first + (self.at + self.passes) % count),)
        self.at, self.passes = 0, self.passes + 1

    def state_dict(self) -> Any:
        return {"at": self.at, "passes": self.passes}

    def load_state_dict(self, state: Any) -> None:
        self.at, self.passes = state["at"], state["passes"]


KINDS = {
    "loader": lambda a, b, size: Loader(numbered(a, b), size),
    "workers": lambda a, b, size: Loader(numbered(a, b), size, num_workers=1),
    "dataloader": lambda a, b, size: DataLoader(numbered(a, b), size, shuffle=True),
    "iterable": lambda a, b, size: Loader(Lines(a, b), size),
    "list": lambda a, b, size: [(torch.arange(i, min(i + size, b)),) for i in range(a, b, size)],
    "stateful": lambda a, b, size: Loader(Stateful(a, b), size),
}


def source(data: Any, rank: int = 0, num_replicas: int = 1, **how: Any) -> Any:
    reading = {"batch_size": 4, "shuffle": True, "seed": 0, "seeded": True, **how}
    return open_source(data, DataConfig(**reading, rank=rank, num_replicas=num_replicas), "data")


def read(opened: Any, epoch: int = 0, start: int = 0) -> list[Any]:
    """Each batch as a dict of lists of numbers; None for a dummy batch."""
    return [
        {n: None if b is None else b[0].tolist() for n, b in batch.items()} if size else None
        for batch, size, *_ in opened.open(epoch, start)
    ]


def column(batches: list[Any], name: str) -> list[int]:
    return [i for batch in batches if batch is not None for i in batch[name] or ()]


@pytest.mark.parametrize("small", KINDS)
@pytest.mark.parametrize("large", ["loader", "iterable", "list"])
def test_the_longest_is_read_once_and_the_shorter_is_started_again(small, large):
    data = {"s": KINDS[small](0, 5, 2), "l": KINDS[large](10, 31, 3)}
    opened = source(data)
    for epoch in range(2):
        batches = read(opened, epoch)
        assert len(batches) == 7
        assert sorted(column(batches, "l")) == list(range(10, 31))
        if small == "stateful" and epoch:
            continue  # it reads on where the epoch before has left it
        passes = column(batches, "s")
        assert sorted(passes[:5]) == sorted(passes[5:10]) == list(range(5))
        if small in ("loader", "workers", "dataloader"):
            assert passes[:5] != passes[5:10], "each pass has an order of its own"
    opened.close()


@pytest.mark.parametrize(
    ("mode", "steps", "small", "large"),
    [
        ("min_size", 3, range(5), None),
        ("max_size", 7, range(5), range(10, 31)),
        ("sequential", 10, range(5), range(10, 31)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_modes(mode, steps, small, large, kind):
    data = CombinedLoader({"s": KINDS[kind](0, 5, 2), "l": KINDS[kind](10, 31, 3)}, mode)
    opened = source(data)
    batches = read(opened)
    assert len(batches) == steps
    assert opened.batches_per_epoch() in (None, steps)
    assert sorted(column(batches, "s")) == list(small)
    assert len(column(batches, "l")) == (9 if large is None else 21)
    if mode == "max_size":
        assert [batch["s"] is None for batch in batches] == [False] * 3 + [True] * 4
    if mode == "sequential":
        assert [batch["l"] is None for batch in batches] == [True] * 3 + [False] * 7
    opened.close()


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size", "sequential"])
@pytest.mark.parametrize("kind", ["loader", "workers", "iterable"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_the_batches_that_one_rank_reads(mode, kind, ranks):
    def make() -> Any:
        parts = {"s": KINDS[kind](0, 5, 2), "l": KINDS["loader"](10, 31, 3)}
        return CombinedLoader(parts, mode)

    whole = read(source(make()))
    opened = [source(make(), rank, ranks) for rank in range(ranks)]
    parts = [read(each) for each in opened]
    dealt = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert dealt == whole + [None] * (len(dealt) - len(whole))
    totals = [[item.total for item in each.open(0, 0)] for each in opened]
    assert totals[0] == totals[1]
    for each in opened:
        each.close()


@pytest.mark.parametrize("mode", ["max_size_cycle", "min_size", "max_size", "sequential"])
@pytest.mark.parametrize(
    ("small", "large"),
    [
        ("loader", "workers"),
        ("iterable", "loader"),
        ("list", "stateful"),
        ("stateful", "dataloader"),
    ],
)
def test_a_resume_from_any_batch_reads_on(mode, small, large):
    def make() -> Any:
        return CombinedLoader({"s": KINDS[small](0, 5, 2), "l": KINDS[large](10, 25, 3)}, mode)

    whole = read(source(make()), epoch=1)
    for stop in range(1, len(whole)):
        stopped, resumed = source(make()), source(make())
        items = stopped.open(1, 0)
        for _ in range(stop):
            end = next(items).end
        resumed.load_state(stopped.state())
        assert read(resumed, 1, end) == whole[stop:], stop
        items.close()
        stopped.close()
        resumed.close()


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1), (2, 3)])
def test_a_resume_on_other_ranks_or_with_another_batch_size_reads_each_sample_once(ranks):
    def make(size: int) -> Any:
        return {"s": Loader(numbered(0, 8), 2), "l": Loader(numbered(10, 34), size)}

    before, after = ranks
    stopped = [source(make(3), rank, before) for rank in range(before)]
    seen: list[int] = []
    for each in stopped:
        items = each.open(0, 0)
        for _ in range(2):
            batch, _, _, end = next(items)
            seen += batch["l"][0].tolist()
    assert len({str(each.state()) for each in stopped}) == 1, "all ranks stand at one place"
    for rank in range(after):
        resumed = source(make(4), rank, after)
        resumed.load_state(stopped[0].state())
        seen += column(read(resumed, 0, end), "l")
    assert sorted(seen) == list(range(10, 34))


def test_a_list_gives_lists_and_equal_data_gets_different_orders():
    opened = source([Loader(numbered(0, 40), 4), Loader(numbered(0, 40), 4)])
    batch, size, total, end = next(opened.open(0, 0))
    assert isinstance(batch, list)
    assert batch[0][0].tolist() != batch[1][0].tolist()
    assert (size, total, end) == (8, 8, 1)
    batches = [torch.zeros(4), torch.ones(4)]
    assert len(list(source(batches).open(0, 0))) == 2, "a list of batches stays one"


class Both(Tiny):
    """Trains on labelled points and on others beside them."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        self.data, self.seen = data, []

    def train_data(self) -> Any:
        return self.data()

    def train_step(self, batch: Any) -> Any:
        self.seen.append((batch["a"][0][:, 0].tolist(), batch["b"][0].tolist()))
        return (
            super().train_step(batch["a"])
            + self.net(batch["b"][0][:, None] * 0.1 + torch.ones(8)).mean()
        )


@pytest.mark.parametrize("rng", ["counter", "stream"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_run_that_is_stopped_reads_and_learns_as_one_that_is_not(stop, workers, rng, tmp_path):
    def data() -> Any:
        small = Loader(points(6), 4, num_workers=workers)
        return {"a": small, "b": Loader(TensorDataset(torch.arange(20.0)), 4)}

    options = {"epochs": 3, "eval_every": "never", "rng": rng}
    whole, stopped, resumed = Both(data), Both(data), Both(data)
    result = quiet(**options).run(whole)
    assert (result.step, result.progress.samples) == (15, 3 * (20 + 4 + 2 + 4 + 2 + 4))
    saving = {**options, "run_dir": tmp_path, "checkpoint": True, "resume": "auto"}
    fit = quiet(**saving)
    fit.on("step_end", lambda run, out: run.stop("here") if run.progress.step == stop else None)
    fit.run(stopped)
    quiet(**saving).run(resumed)
    assert stopped.seen + resumed.seen == whole.seen
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_limits_and_global_batch_sizes_count_the_data_sets_together():
    def data() -> Any:
        return {"a": Loader(points(12), 4), "b": Loader(TensorDataset(torch.arange(20.0)), 2)}

    assert quiet(limit_train=3, eval_every="never").run(Both(data)).step == 3
    assert quiet(limit_train=0.5, eval_every="never").run(Both(data)).step == 5
    result = quiet(global_batch_size=12, eval_every="never").run(Both(data))
    assert result.step == 5
    with pytest.raises(OptionError, match="not a multiple of the 6 samples"):
        quiet(global_batch_size=8).run(Both(data))
    with pytest.raises(OptionError, match="give accumulate="):
        quiet(global_batch_size=8).run(Both(lambda: CombinedLoader(data(), "sequential")))


def test_a_list_of_evaluation_sets_is_named_by_number():
    task = Tiny()
    task.eval_data = lambda: [DataLoader(points(8), 4), points(4)]
    assert {"eval/0/loss", "eval/1/loss"} <= quiet().evaluate(task).keys()


class Empty(IterableDataset):
    def __iter__(self) -> Any:
        return iter(())


class DatasetDict(dict):
    """As that of the library datasets."""


def foreign() -> Any:
    made = type("CombinedLoader", (), {"__module__": "lightning.pytorch.utilities"})
    return made()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"x": torch.ones(4, 2), "y": torch.ones(4)}, r"data\['x'\] is a Tensor: .* TensorDataset"),
        ({"x": np.ones(4)}, r"data\['x'\] is a ndarray"),
        ({"text": ["a", "b"]}, r"data\['text'\] is a list"),
        ({}, "returned no data set"),
        ({"a": points(4), "b": {"c": points(4)}}, r"data\['b'\] holds several data sets"),
        ({"a": Loader(points(8)), "b": Loader(Empty())}, r"data\['b'\] gave no batch"),
        ({"a": points(8), "b": iter([torch.ones(2)])}, r"data\['b'\] gave no batch when it was st"),
        ({"a": points(8), "b": 5}, r"data\['b'\] returned int"),
        (DatasetDict(train=points(4), test=points(4)), "with the splits train, test: return one"),
        (foreign(), "the CombinedLoader of lightning: give the same arguments to loopkit.data"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_cannot_be_read_side_by_side_is_refused(data, text):
    with pytest.raises(DataError, match=text):
        list(source(data).open(0, 0))


def test_more_refusals_and_modes():
    sharded = {"a": points(4), "b": Loader(Lines(0, 4), sharded=True)}
    with pytest.raises(
        DataError, match=r"data\['b'\] gives each rank samples of its own \(sharded\)"
    ):
        source(sharded, 0, 2)
    with pytest.raises(DataError, match=r"pass rng='counter', or give a Loader"):
        source({"a": points(4), "b": DataLoader(points(4))}, seeded=False)
    with pytest.raises(OptionError, match="give one of 'max_size_cycle'"):
        CombinedLoader([points(4)], "longest")
