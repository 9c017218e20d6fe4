"""Epochs are passes over the data, whatever changes between them or at a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, TensorDataset

from loopkit import Loader
from loopkit.errors import LoopkitWarning
from loopkit.optim import SGD, linear
from tests.support import Tiny, points, quiet

COUNT = 40


class Reads(Tiny):
    """Notes the samples that it is trained on, by their first feature."""

    def __init__(self, data: Any = None) -> None:
        super().__init__()
        self.data = data
        self.ids: list[float] = []

    def optimizers(self) -> Any:
        return SGD(lr=0.01)

    def train_data(self) -> Any:
        return numbered(COUNT) if self.data is None else self.data()

    def train_step(self, batch: Any) -> Any:
        self.ids += batch[0][:, 0].tolist()
        return super().train_step(batch)

    def eval_data(self) -> Any:
        return points(8)


def numbered(count: int, first: int = 0) -> TensorDataset:
    x, y = points(count).tensors
    x = x.clone()
    x[:, 0] = torch.arange(first, first + count)
    return TensorDataset(x, y)


@pytest.mark.parametrize("stop", [1, 3, 7, 13])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"batch_size": 4}, {"batch_size": 8}),
        ({"batch_size": 8}, {"batch_size": 4}),
        ({"batch_size": 4}, {"batch_size": 3}),
        ({"batch_size": 4, "accumulate": 2}, {"batch_size": 4}),
        ({"batch_size": 4}, {"batch_size": 4, "global_batch_size": 20}),
    ],
)
def test_a_resume_with_other_batches_reads_each_sample_once_in_each_pass(
    before, after, stop, tmp_path
):
    options = {"epochs": 3, "run_dir": tmp_path, "checkpoint": True, "resume": "auto"}
    task, evals = Reads(), []
    fit = quiet(**options, **before)
    fit.on("step_end", lambda run, out: run.stop("here") if run.progress.step == stop else None)
    fit.run(task)
    read = task.ids
    again = Reads()
    fit = quiet(**options, **after)
    fit.on("eval_end", lambda run, metrics: evals.append(run.progress.epoch))
    result = fit.run(again)
    read += again.ids
    assert result.status == "finished"
    assert result.epoch == 3
    assert len(read) == 3 * COUNT
    for epoch in range(3):
        assert sorted(read[COUNT * epoch : COUNT * (epoch + 1)]) == list(range(COUNT))
    assert evals == list(range(4 - len(evals), 4)), "an evaluation ends each pass"
    epochs = [row["epoch"] for row in result.history if "epoch" in row]
    assert epochs == sorted(epochs)
    assert epochs[-1] <= 3


def test_a_schedule_follows_a_resume_with_other_batches_and_the_change_is_reported(tmp_path):
    class Scheduled(Reads):
        def optimizers(self) -> Any:
            return SGD(lr=1.0, schedule=linear())

    options = {"epochs": 2, "run_dir": tmp_path, "checkpoint": True, "resume": "auto"}
    fit = quiet(**options, batch_size=4)
    fit.on("step_end", lambda run, out: run.stop("here") if run.progress.step == 15 else None)
    fit.run(Scheduled())
    rates: list[float] = []
    fit = quiet(**options, batch_size=10)
    fit.on("step_end", lambda run, out: rates.append(run.optimizers["main"].param_groups[0]["lr"]))
    with pytest.warns(LoopkitWarning, match="a run of 20 steps and now for one of 17"):
        result = fit.run(Scheduled())
    assert result.step == 17
    assert rates == pytest.approx([2 / 17, 1 / 17])


class Promises:
    """Batches whose len() is a guess."""

    def __init__(self, batches: int, promised: int) -> None:
        self.batches, self.promised = batches, promised

    def __len__(self) -> int:
        return self.promised

    def __iter__(self) -> Any:
        data = numbered(4 * self.batches)
        yield from (data[4 * i : 4 * i + 4] for i in range(self.batches))


@pytest.mark.parametrize("promised", [3, 5, 6, 8])
@pytest.mark.parametrize("rng", ["counter", "stream"])
def test_a_wrong_length_changes_no_number_of_passes(promised, rng):
    task, evals = Reads(lambda: Promises(5, promised)), []
    fit = quiet(epochs=3, rng=rng)
    fit.on("eval_end", lambda run, metrics: evals.append(run.progress.step))
    if promised == 5:
        result = fit.run(task)
    else:
        with pytest.warns(LoopkitWarning, match=f"a pass has {promised} steps, and it had 5"):
            result = fit.run(task)
    assert (result.epoch, result.step) == (3, 15)
    assert task.ids == [*range(20)] * 3
    assert evals == [5, 10, 15]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterable_with_a_length_and_workers_is_read_to_its_end(workers):
    class Sized(IterableDataset):
        def __len__(self) -> int:
            return 26

        def __iter__(self) -> Any:
            info = torch.utils.data.get_worker_info()
            first, step = (info.id, info.num_workers) if info else (0, 1)
            data = numbered(26)
            yield from (data[i] for i in range(first, 26, step))

    task = Reads(lambda: DataLoader(Sized(), batch_size=4, num_workers=workers))
    if workers:
        with pytest.warns(LoopkitWarning, match="a pass has 7 steps, and it had 8"):
            quiet(epochs=2).run(task)
    else:
        quiet(epochs=2).run(task)
    assert sorted(task.ids) == sorted([*range(26)] * 2)


@pytest.mark.parametrize("at", [1, 3])
def test_an_epoch_that_is_ended_early_is_one_pass(at):
    task = Reads()
    fit = quiet(epochs=3, batch_size=8)

    @fit.on("step_end")
    def cut(run: Any, out: Any) -> None:
        if run.progress.step_in_epoch == at:
            run.request("end_epoch")

    result = fit.run(task)
    assert (result.epoch, result.step) == (3, 3 * at)


class Curriculum(Dataset):
    """Grows or shrinks from epoch to epoch, and says which epoch each sample is of."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.epoch = lengths, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.lengths[self.epoch]

    def __getitem__(self, index: int) -> Any:
        if index >= len(self):
            raise IndexError(index)
        x, y = numbered(1, 100 * self.epoch + index)[0]
        return x, y


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("lengths", [[4, 8, 12], [12, 8, 4], [8, 8, 8]])
def test_data_that_changes_between_epochs_is_read_as_it_is(lengths, persistent, workers, tmp_path):
    def make() -> Reads:
        return Reads(
            lambda: Loader(Curriculum(lengths), num_workers=workers, persistent_workers=persistent)
        )

    task = make()
    result = quiet(epochs=3, batch_size=4).run(task)
    expected = [[100 * e + i for i in range(n)] for e, n in enumerate(lengths)]
    assert result.epoch == 3
    assert result.step == sum(lengths) // 4
    start = 0
    for ids in expected:
        assert sorted(task.ids[start : start + len(ids)]) == ids
        start += len(ids)
    stopped, resumed = make(), make()
    fit = quiet(epochs=3, batch_size=4, run_dir=tmp_path, checkpoint=True, resume="auto")
    first = fit.with_options()
    first.on("step_end", lambda run, out: run.stop("here") if run.progress.step == 3 else None)
    first.run(stopped)
    fit.run(resumed)
    assert stopped.ids + resumed.ids == task.ids


def test_data_changed_by_the_task_between_epochs_is_read_as_it_is():
    class Appends(Reads):
        def __init__(self) -> None:
            super().__init__()
            self.rows = [*numbered(8)]

        def train_data(self) -> Any:
            return Rows(self.rows)

        def on_epoch_end(self, run: Any) -> None:
            self.rows += [*numbered(4, first=len(self.rows))]

    task = Appends()
    result = quiet(epochs=3, batch_size=4).run(task)
    assert (result.epoch, result.step) == (3, 2 + 3 + 4)
    assert sorted(task.ids) == sorted([*range(8), *range(12), *range(16)])


class Rows(Dataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return self.rows[index]


class ByEpoch(BatchSampler):
    """Batches in another order in each epoch, if told which it is."""

    def __init__(self, sampler: Any = None) -> None:
        self.epoch, self.sampler = 0, sampler

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        epoch = self.sampler.epoch if self.sampler is not None else self.epoch
        yield from ([8 * ((b + epoch) % 5) + i for i in range(8)] for b in range(5))


class Inside:
    """A sampler inside of a batch sampler."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


@pytest.mark.parametrize("inside", [False, True])
def test_an_epoch_is_announced_to_a_batch_sampler_and_to_what_is_inside_of_it(inside):
    class Plain(ByEpoch):
        set_epoch = None  # type: ignore[assignment]

    sampler = Plain(Inside()) if inside else ByEpoch()
    task = Reads(lambda: DataLoader(numbered(COUNT), batch_sampler=sampler))
    quiet(epochs=3).run(task)
    assert [task.ids[COUNT * epoch] for epoch in range(3)] == [0.0, 8.0, 16.0]
    assert len(task.ids) == 3 * COUNT
