"""Schedules that count epochs: loopkit's own and torch's, in the shapes that Lightning knows."""

from __future__ import annotations

import math

import pytest
from torch.optim import SGD as TorchSGD
from torch.optim import lr_scheduler
from torch.utils.data import IterableDataset

from loopkit import Checkpoint
from loopkit.durations import RunLength
from loopkit.errors import LoopkitWarning, OptionError, TaskError
from loopkit.optim import SGD, Schedule, cosine, linear, multi_step, step_decay, wsd
from tests.support import Tiny, points, quiet


class Stream(IterableDataset):
    """Three batches of the points, and no length."""

    def __iter__(self):
        yield from points(24)


class Rated(Tiny):
    def __init__(self, make, stream: bool = False):
        super().__init__(count=24, dropout=0.0)
        self.make, self.stream = make, stream

    def optimizers(self):
        return self.make(self)

    def train_data(self):
        return Stream() if self.stream else super().train_data()


def rates(make, stream=False, *, stop=None, **options):
    """The rate of each step. There are three steps in an epoch."""
    found = []
    fit = quiet(**{"epochs": 4, "batch_size": 8, "eval_every": "never"} | options)
    fit.on(
        "before_update",
        lambda run, norm: found.append(run.optimizers["main"].param_groups[0]["lr"]),
    )
    # Ours set the rate after that event.
    fit.on(
        "step_end",
        lambda run, out: found.__setitem__(
            -1, found[-1] if stepped(run) else run.optimizers["main"].param_groups[0]["lr"]
        ),
    )
    fit.on("step_end", lambda run, out: run.stop("test") if run.progress.step == stop else None)
    fit.run(Rated(make, stream))
    return found


def stepped(run):
    return hasattr(run.schedules["main"], "scheduler")


def torchs(kind, *args, shape=None, **settings):
    def make(task):
        optimizer = TorchSGD(task.parameters(), lr=0.1)
        scheduler = kind(optimizer, *args, **settings)
        return (shape or by_epoch)(optimizer, scheduler)

    return make


def by_epoch(optimizer, scheduler):
    return optimizer, {"scheduler": scheduler, "interval": "epoch"}


OURS = {
    "milestones": (
        multi_step(["1 epoch", "3 epochs"], 0.5),
        (lr_scheduler.MultiStepLR, [1, 3], 0.5),
    ),
    "regular": (step_decay("2 epochs"), (lr_scheduler.StepLR, 2)),
    "exponential": (step_decay("1 epoch", 0.7), (lr_scheduler.ExponentialLR, 0.7)),
    "cosine": (cosine().by_epoch(), (lr_scheduler.CosineAnnealingLR, 4)),
    "own": (
        Schedule("own", lambda epoch, total: 0.9 ** (epoch * epoch), unit="epoch"),
        (lr_scheduler.LambdaLR, lambda epoch: 0.9 ** (epoch * epoch)),
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_a_schedule_by_epochs_is_torchs_stepped_after_each_epoch(name, stream):
    ours, theirs = OURS[name]
    found = rates(lambda task: SGD(lr=0.1, schedule=ours), stream)
    assert len(found) == 12
    assert all(len(set(found[start : start + 3])) == 1 for start in range(0, 12, 3))
    assert len(set(found)) > 1
    assert found == pytest.approx(rates(torchs(*theirs), stream))


MAKERS = {
    "ours": lambda task: SGD(lr=0.1, schedule=multi_step(["1 epoch", "3 epochs"], 0.5)),
    "warm": lambda task: SGD(lr=0.1, schedule=cosine(warmup="1 epoch").by_epoch()),
    "torch": torchs(lr_scheduler.MultiStepLR, [1, 3], 0.5),
    "every second epoch": torchs(
        lr_scheduler.ExponentialLR,
        0.5,
        shape=lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "frequency": 2}},
    ),
    "every second step": torchs(
        lr_scheduler.ExponentialLR,
        0.9,
        shape=lambda o, s: (o, {"scheduler": s, "interval": "step", "frequency": 2}),
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_run_resumed_at_any_step_has_the_same_rates(name, tmp_path):
    make = MAKERS[name]
    whole = rates(make)
    assert len(set(whole)) > 1
    for stop in (1, 2, 3, 4, 6, 8, 9):
        options = {
            "run_dir": tmp_path / str(stop),
            "checkpoint": Checkpoint(background=False),
            "resume": "auto",
        }
        assert rates(make, stop=stop, **options) + rates(make, **options) == whole


def test_a_frequency_counts_epochs_and_steps():
    assert rates(MAKERS["every second epoch"]) == pytest.approx([0.1] * 6 + [0.05] * 6)
    steps = [0.1 * 0.9 ** (step // 2) for step in range(12)]
    assert rates(MAKERS["every second step"]) == pytest.approx(steps)


@pytest.mark.parametrize(
    "shape",
    [
        lambda o, s: ([o], [s]),
        lambda o, s: [[o], [{"scheduler": s}]],
        lambda o, s: {"optimizer": o, "lr_scheduler": s},
        lambda o, s: [{"optimizer": o, "lr_scheduler": {"scheduler": s, "interval": "epoch"}}],
        lambda o, s: {"main": {"optimizer": o, "lr_scheduler": s}},
    ],
)
def test_the_shapes_of_lightning_go_by_epochs_as_there(shape):
    found = rates(torchs(lr_scheduler.StepLR, 2, shape=shape))
    assert found == pytest.approx([0.1] * 6 + [0.01] * 6)


def test_lightnings_plateau_watches_its_metric():
    def shape(optimizer, scheduler):
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "eval/far/loss"}

    class Sets(Rated):
        def eval_data(self):
            return {"near": points(8), "far": points(8, seed=3)}

    task = Sets(torchs(lr_scheduler.ReduceLROnPlateau, shape=shape, patience=0, threshold=0.99))
    quiet(epochs=3, batch_size=8).run(task)
    with pytest.raises(OptionError, match="StepLR watches no metric"):
        rates(torchs(lr_scheduler.StepLR, 2, shape=shape))


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (lambda o, s: (o, [s]), "an optimizer with a list of schedulers"),
        (lambda o, s: [o, o], "2 optimizers without names"),
        (lambda o, s: (o, o), "2 optimizers without names"),
        (lambda o, s: ([o, o], [s]), "2 optimizers without names"),
        (lambda o, s: ([o], [s, s]), "2 schedulers for one optimizer"),
        (lambda o, s: None, "returned NoneType: give a loopkit.optim spec"),
    ],
)
def test_a_shape_that_means_nothing_is_an_error(shape, said):
    with pytest.raises(TaskError, match=said):
        rates(torchs(lr_scheduler.StepLR, 2, shape=shape))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"interval": "batch"}, r"StepLR\(interval='batch'\) is not known: give one of 'step'"),
        ({"frequency": 0}, r"StepLR\(frequency=0\)"),
        ({"intervall": "step"}, "no setting 'intervall'. Did you mean 'interval'"),
        ({"name": "rate"}, "logged as lr, or as lr/<optimizer>"),
        ({"strict": False}, "strict=False would train on without the metric"),
    ],
)
def test_a_bad_setting_of_a_scheduler_is_an_error(config, said):
    with pytest.raises(OptionError, match=said):
        rates(torchs(lr_scheduler.StepLR, 2, shape=lambda o, s: (o, {"scheduler": s, **config})))


def test_a_scheduler_of_another_optimizer_or_of_none_is_an_error():
    def shape(optimizer, scheduler):
        return TorchSGD(scheduler.optimizer.param_groups[0]["params"], lr=1.0), scheduler

    with pytest.raises(OptionError, match="LambdaLR was made for another optimizer"):
        rates(torchs(lr_scheduler.LambdaLR, lambda step: 1.0, shape=shape))
    with pytest.raises(OptionError, match="str is no scheduler of torch"):
        rates(lambda task: (TorchSGD(task.parameters(), lr=0.1), "cosine"))


def test_a_scheduler_alone_that_often_counts_epochs_is_reported():
    with pytest.warns(LoopkitWarning, match="StepLR is stepped after each optimizer step"):
        found = rates(torchs(lr_scheduler.StepLR, 2, shape=lambda o, s: (o, s)))
    assert found[:4] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_points_in_steps_and_percent_are_of_the_run():
    factor = multi_step([10, "50%"], 0.5, warmup=4).resolve(RunLength(steps=40))
    assert [factor(step) for step in (0, 2, 4, 9, 10, 19, 20, 39)] == [
        0,
        0.5,
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
    ]
    factor = step_decay(10).resolve(RunLength())
    assert factor(9) == 1.0
    assert factor(25) == pytest.approx(0.01)


def test_lengths_by_epochs_are_epochs():
    schedule = wsd(decay="2 epochs", shape="linear").by_epoch()
    found = [
        schedule.resolve(RunLength(steps_per_epoch=5, steps=25, epochs=5, epoch=epoch))(5 * epoch)
        for epoch in range(5)
    ]
    assert found == [1, 1, 1, 1, 0.5]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: multi_step([]), "give the milestones"),
        (lambda: multi_step("30 epochs"), "give the milestones"),
        (lambda: multi_step(["30 sec"]).resolve(RunLength(steps=5)), "not a time"),
        (lambda: step_decay(0), "give a length above 0"),
        (lambda: cosine().by_epoch().resolve(RunLength()), r"give Fit\(epochs=...\)"),
        (lambda: Schedule("own", lambda step, total: 1.0, unit="day"), "unit='day'"),
    ],
)
def test_what_cannot_be_counted_is_an_error(make, said):
    with pytest.raises(OptionError, match=said):
        make()


def outer(step, total):
    return sum(total for _ in range(2)) / step  # read inside of another function


@pytest.mark.parametrize(
    ("shape", "needs"),
    [
        (lambda step, total: 0.5 ** (step // 4), False),
        (lambda step, total: step / total, True),
        (outer, True),
        (lambda *counts: 1.0, True),
        (math.hypot, True),
    ],
)
def test_a_function_that_ignores_the_end_needs_none(shape, needs):
    assert Schedule("own", shape).needs_total is needs


def test_a_schedule_without_an_end_runs_where_no_end_is_known():
    halving = Schedule("halving", lambda step, total: 0.5 ** (step // 4))
    found = rates(lambda task: SGD(lr=0.1, schedule=halving), stream=True, epochs=2)
    assert found == pytest.approx([0.1] * 4 + [0.05] * 2)
    with pytest.raises(OptionError, match="'linear' needs to know where the run ends"):
        rates(lambda task: SGD(lr=0.1, schedule=linear()), stream=True, epochs=2)
