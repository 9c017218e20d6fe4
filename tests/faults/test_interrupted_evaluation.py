"""A signal ends an evaluation at its next batch; the resumed run begins it again, as if never cut."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from torchmetrics import MeanMetric

from loopkit import Checkpoint, Hook
from loopkit.hooks import EMA
from loopkit.loggers.jsonl import read_rows
from loopkit.optim import SGD, reduce_on_plateau
from tests.support import Tiny, digest, points, quiet

TIMED = ("time", "eval/runtime", "eval/samples_per_second")


class Long(Tiny):
    """Tiny whose evaluation has ten batches, and which counts them in a metric that it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = MeanMetric()

    def eval_step(self, batch):
        self.kept.update(1.0)
        return super().eval_step(batch)

    def eval_data(self):
        return points(80, seed=2)

    def optimizers(self):
        return SGD(lr=0.1, schedule=reduce_on_plateau("eval/loss:min", patience=0))


class Sends(Hook):
    """Sends a signal to this process in the given batch of the given evaluation, both from 1."""

    def __init__(self, number: int, evaluation: int, batch: int) -> None:
        self.number, self.at, self.seen = number, (evaluation, batch), [0, 0]
        self.cut = 0

    def on_eval_start(self, run):
        self.seen = [self.seen[0] + 1, 0]

    def on_eval_step_end(self, run, outputs):
        self.seen[1] += 1
        if tuple(self.seen) == self.at:
            os.kill(os.getpid(), self.number)

    def on_eval_interrupted(self, run):
        self.cut += 1


def train(run_dir: Path, *hooks: Hook, **options: Any) -> tuple[Any, ...]:
    task, ema = Long(), EMA(0.9)
    fit = quiet(
        epochs=2,
        batch_size=8,
        run_dir=run_dir,
        resume="auto",
        hooks=[ema, *hooks],
        **{
            "loggers": "jsonl",
            "eval_every": "1 epoch",
            "checkpoint": Checkpoint(every="1 epoch", best="eval/loss:min", background=False),
            **options,
        },
    )
    result = fit.run(task)
    log = run_dir / "metrics.jsonl"
    rows = [
        {name: value for name, value in row.items() if name not in TIMED}
        for row in (read_rows(log) if log.exists() else [])
    ]
    return digest(task.state_dict()), digest(ema.state_dict()["averages"]), rows, result


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("evaluation", [1, 2])
@pytest.mark.parametrize("batch", [1, 9])
def test_a_preempted_evaluation_is_begun_again(tmp_path, whole, evaluation, batch):
    sends = Sends(signal.SIGTERM, evaluation, batch)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path, sends)
    assert ended.value.code == 143
    assert sends.seen == [evaluation, batch]
    assert sends.cut == 1
    assert not any("eval/loss" in row for row in read_rows(tmp_path / "metrics.jsonl")[-1:])
    *same, result = train(tmp_path)
    assert same == list(whole[:-1])
    assert result.status == "finished"
    assert result.best["step"] == whole[-1].best["step"]
    assert result.best["checkpoint"].is_dir()


def on_two_ranks(place: Path, sender: int) -> tuple[Any, ...]:
    """Preempt one rank in its second evaluation; returns the code, and whether the resume is exact."""
    ddp = {"strategy": "ddp", "loggers": None}
    number = signal.SIGTERM if int(os.environ["RANK"]) == sender else 0  # 0 sends nothing
    sends, code = Sends(number, 2, 2), None
    try:
        # A message before each batch: otherwise these evaluations are over within the second.
        with mock.patch("loopkit.loops.coordination.SYNC_INTERVAL", 0.0):
            train(place / "cut", sends, **ddp)
    except SystemExit as ended:
        code = ended.code
    cut, exact = train(place / "cut", **ddp), train(place / "whole", **ddp)
    return code, sends.cut, cut[:2] == exact[:2], cut[3].metrics["eval/loss"]


@pytest.mark.parametrize("sender", [0, 1])
def test_all_ranks_leave_an_evaluation_before_the_same_batch(pair, tmp_path, sender):
    first, second = pair.call(on_two_ranks, tmp_path, sender)
    assert first == second
    assert first[:3] == (143, 1, True)


def test_an_evaluation_can_be_cut_short_again_and_again(tmp_path, whole):
    for batch in (3, 1, 7):
        with pytest.raises(SystemExit):
            train(tmp_path, Sends(signal.SIGHUP, 1, batch))
    assert train(tmp_path)[:-1] == whole[:-1]


def test_a_first_evaluation_can_be_cut_short(tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path, Sends(signal.SIGTERM, 1, 2), eval_first=True)
    assert train(tmp_path, eval_first=True)[2][0]["step"] == 0


@pytest.mark.parametrize("numbers", [("SIGTERM", "SIGINT"), ("SIGINT", "SIGTERM")])
def test_no_other_end_hides_a_sigterm(tmp_path, numbers):
    def interrupt(run, out):
        if run.progress.step == 2:
            for name in numbers:
                os.kill(os.getpid(), getattr(signal, name))
            run.stop("a hook had enough")

    fit = quiet(batch_size=8, run_dir=tmp_path, checkpoint=Checkpoint(background=False))
    fit.on("step_end", interrupt)
    with pytest.raises(SystemExit) as ended:
        fit.run(Tiny())
    assert ended.value.code == 143


def test_an_ignored_sighup_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit = quiet(batch_size=8, run_dir=tmp_path)
        fit.on("step_end", lambda run, out: os.kill(os.getpid(), signal.SIGHUP))
        assert fit.run(Tiny()).status == "finished"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
