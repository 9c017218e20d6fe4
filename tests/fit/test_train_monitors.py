"""Values that training logs decide about the best checkpoint, early stopping and the plateau."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from loopkit import Checkpoint, Hook
from loopkit.errors import LoopkitWarning, MetricError, OptionError
from loopkit.hooks import EarlyStop
from loopkit.optim import SGD, reduce_on_plateau
from tests.support import Tiny, quiet

VALUES = [5.0, 3.0, 4.0, 1.0, 2.0, 6.0, 0.5, 7.0]
"""The value of each step. Logs after steps 1, 2, 4, 6 and 8 have 5, 3, 2.5, 4 and 3.75."""


class Scripted(Tiny):
    """Logs these values, one each step; in on_epoch_end the last one. An epoch has two steps."""

    def __init__(self, values=VALUES, schedule=None):
        super().__init__(count=16)
        self.values, self.schedule, self.rates = list(values), schedule, []

    def on_step_end(self, run, out):
        self.log("mine", self.values[run.progress.step - 1])
        self.rates.append(run.optimizers["main"].param_groups[0]["lr"])

    def on_epoch_end(self, run):
        self.log("epoch/last", self.values[run.progress.step - 1])

    def optimizers(self):
        return SGD(lr=1.0, schedule=self.schedule)


class Never(Scripted):
    """Has nothing to evaluate on."""

    def eval_data(self):
        return None


def trained(task, tmp_path, stop=None, **options):
    options = {"epochs": 4, "batch_size": 8, "log_every": 2, "resume": "auto", **options}
    fit = quiet(run_dir=tmp_path, **options)
    if stop is not None:
        fit.on("step_end", lambda run, out: run.stop("x") if run.progress.step == stop else None)
    return fit.run(task)


def kept(tmp_path):
    folders = sorted((tmp_path / "checkpoints").glob("step-*"))
    return {
        int(path.name[5:]): json.loads((path / "MANIFEST.json").read_text())["metrics"]
        for path in folders
    }


@pytest.mark.parametrize("kind", [Scripted, Never])
@pytest.mark.parametrize(
    ("best", "step", "value"),
    [("mine:min", 4, 2.5), ("mine:max", 1, 5.0), ("epoch/last:min", 4, 1.0), ("epoch/last:max", 8, 7.0)],
)  # fmt: skip
@pytest.mark.parametrize("stops", [(), (3,), (4,), (2, 5)])
def test_the_best_is_decided_where_the_value_is_logged(tmp_path, kind, best, step, value, stops):
    settings = Checkpoint(best=best, every="never", keep=1, background=False)
    for stop in (*stops, None):
        result = trained(kind(), tmp_path, stop, checkpoint=settings)
    assert (result.best["metric"], result.best["step"], result.best["value"]) == (
        best.partition(":")[0],
        step,
        value,
    )
    found = kept(tmp_path)
    assert set(found) == {step, 8}
    assert found[step][result.best["metric"]] == value
    assert result.best["checkpoint"].name == f"step-{step:012}"


def test_the_best_weights_by_a_training_value_are_loaded(tmp_path):
    seen = {}

    class Noting(Scripted):
        def on_commit(self, run):
            seen[run.progress.step] = {n: p.detach().clone() for n, p in self.named_parameters()}

    task = Noting()
    trained(task, tmp_path, checkpoint=Checkpoint(best="mine:min", load_best=True))
    for name, parameter in task.named_parameters():
        assert torch.equal(parameter, seen[4][name])


@pytest.mark.parametrize(
    ("metric", "patience", "stopped"),
    [("mine:min", 2, 8), ("mine:min", 1, 6), ("mine:max", 2, 4), ("epoch/last:max", 1, 4)],
)
@pytest.mark.parametrize("stops", [(), (3,), (2, 5)])
def test_early_stop_counts_the_logs(tmp_path, metric, patience, stopped, stops):
    for stop in (*stops, None):
        hook = EarlyStop(metric, patience=patience)
        result = trained(Never(), tmp_path, stop, hooks=[hook], checkpoint=True)
    assert (result.step, result.status) == (stopped, "stopped")
    assert f"has not improved for {patience} log" in result.reason
    assert hook.waited == patience


@pytest.mark.parametrize("stops", [(), (3,), (4,), (2, 5)])
def test_a_plateau_counts_the_logs(tmp_path, stops):
    schedule = reduce_on_plateau("mine:min", factor=0.5, patience=0)
    rates = []
    for stop in (*stops, None):
        task = Never(schedule=schedule)
        trained(task, tmp_path, stop, checkpoint=True)
        rates += task.rates
    assert rates == [1.0] * 6 + [0.5] * 2


def test_a_value_of_evaluations_and_one_of_training_decide_side_by_side(tmp_path):
    hook = EarlyStop("train/loss:min", patience=100)
    result = trained(
        Scripted(), tmp_path, hooks=[hook], checkpoint=Checkpoint(best="eval/loss:min")
    )
    assert result.best["metric"] == "eval/loss"
    rows = [row for row in result.history if "train/loss" in row]
    assert hook.best == min(row["train/loss"] for row in rows)
    with pytest.raises(MetricError, match="the evaluation gave no 'eval/mine'"):
        trained(Scripted(), tmp_path / "b", checkpoint=Checkpoint(best="eval/mine:min"))


@pytest.mark.parametrize("how", ["best", "stop", "plateau"])
def test_a_name_that_nothing_logs_is_reported_after_the_first_epoch(tmp_path, how):
    schedule = reduce_on_plateau("train/los:min") if how == "plateau" else None
    hooks = [EarlyStop("train/los:min")] if how == "stop" else []
    checkpoint = Checkpoint(best="train/los:min") if how == "best" else True
    told = []

    class Told(Hook):
        def on_step_start(self, run, batches):
            told.append(len(caught))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(Never(schedule=schedule), tmp_path, hooks=[*hooks, Told()], checkpoint=checkpoint)
    messages = [str(w.message) for w in caught if issubclass(w.category, LoopkitWarning)]
    assert len(messages) == 1
    assert "waits for 'train/los', and nothing of that name was logged up to step 2" in messages[0]
    assert "Did you mean 'train/loss'?" in messages[0]
    assert told[:3] == [0, 0, 1]


def test_a_name_that_waits_for_its_log_is_not_told(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = trained(
            Never(), tmp_path, log_every="never", checkpoint=Checkpoint(best="mine:min")
        )
    assert result.best["step"] == 8


def test_an_evaluation_is_still_needed_for_its_own_metrics(tmp_path):
    for options in (
        {"checkpoint": Checkpoint(best="eval/loss:min")},
        {"hooks": [EarlyStop("eval/loss:min")]},
    ):
        with pytest.raises(OptionError, match="or name a value that training logs"):
            trained(Never(), tmp_path, **options)


def test_nan_as_best_is_reported_and_so_is_that_nothing_is_loaded(tmp_path):
    nan = float("nan")
    with pytest.warns(LoopkitWarning) as caught:
        result = trained(
            Never([nan] * 8), tmp_path, checkpoint=Checkpoint(best="mine:min", load_best=True)
        )
    messages = [str(w.message) for w in caught if "mine" in str(w.message)]
    assert len(messages) == 2
    assert "mine is NaN at step 1: NaN is never the best" in messages[0]
    assert "load_best=True loads nothing: mine was never a number" in messages[1]
    assert result.best == {}
    with pytest.warns(LoopkitWarning, match="mine is NaN at step 4"):
        result = trained(
            Never([1, 1, nan, nan, 2, 2, 3, 3]),
            tmp_path / "b",
            checkpoint=Checkpoint(best="mine:max"),
        )
    assert result.best["step"] == 8
