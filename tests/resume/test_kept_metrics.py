"""Metrics that a task keeps, measured over the training epoch: exact after a resume and on ranks."""

from __future__ import annotations

import pytest
import torch
import torchmetrics
from torchmetrics import wrappers
from torchmetrics.classification import MulticlassAccuracy

from loopkit.errors import LoopkitWarning
from loopkit.metrics.kept import kept_state, load_kept_state, preserved_metrics
from tests.metric_tasks import accuracy, scores
from tests.support import Tiny, quiet

KINDS = {
    "accuracy": accuracy,
    "persistent": lambda: persistent(accuracy()),
    "mean": lambda: torchmetrics.MeanMetric(),
    "group": lambda: torchmetrics.MetricCollection(
        {"a": accuracy(), "b": torchmetrics.classification.MulticlassPrecision(3)}
    ),
    "list": lambda: torchmetrics.classification.MulticlassAUROC(3),
    "sum": lambda: accuracy() + accuracy(),
    "minmax": lambda: wrappers.MinMaxMetric(accuracy()),
    "running": lambda: wrappers.Running(torchmetrics.MeanMetric(), window=3),
    "classwise": lambda: wrappers.ClasswiseWrapper(MulticlassAccuracy(3, average=None)),
}


def persistent(metric):
    metric.persistent(True)
    return metric


class Keeping(Tiny):
    """Keeps a metric, updated in each step, and read and reset at the end of an epoch."""

    def __init__(self, kind):
        super().__init__(count=40)
        self.kind, self.kept, self.epochs = kind, KINDS[kind](), []

    def train_step(self, batch):
        logits = self.net(batch[0])
        if self.kind in ("mean", "running"):
            self.kept.update(logits.detach().mean())
        else:
            self.kept.update(logits.detach().softmax(-1), batch[1])
        return torch.nn.functional.cross_entropy(logits, batch[1])

    def on_epoch_end(self, run):
        values = self.kept.compute()
        values = values if isinstance(values, dict) else {"value": values}
        run.log({f"train/{name}": value for name, value in values.items()})
        self.epochs.append({name: float(value) for name, value in values.items()})
        if self.kind == "minmax":
            self.kept._base_metric.reset()
        else:
            self.kept.reset()


def trained(kind, folder, *stops, **options):
    epochs = []
    for stop in [*stops, None]:
        task = Keeping(kind)
        fit = quiet(
            epochs=3, batch_size=8, run_dir=folder, resume="auto", checkpoint=True, **options
        )
        fit.on(
            "step_end", lambda run, out, at=stop: run.stop("x") if run.progress.step == at else None
        )
        result = fit.run(task)
        epochs += task.epochs
    return epochs, result


@pytest.mark.parametrize("kind", KINDS)
def test_a_metric_over_the_epoch_is_that_of_a_run_that_never_stopped(tmp_path, kind):
    whole, _ = trained(kind, tmp_path / "whole")
    assert len(whole) == 3
    for stops in ((7,), (3, 8, 10), (5,)):
        parts, result = trained(kind, tmp_path / str(stops), *stops, eval_every="2 steps")
        assert parts == whole, stops
        assert result.status == "finished"


def test_a_tracker_comes_back_with_its_list(tmp_path):
    class Tracking(Tiny):
        def __init__(self):
            super().__init__(count=40)
            self.tracker = wrappers.MetricTracker(accuracy())

        def metrics(self):
            return {"accuracy": self.tracker}

        def on_fit_end(self, run):
            self.all = self.tracker.compute_all().tolist()

    found = []
    for name, stops in (("whole", ()), ("parts", (7,))):
        for stop in [*stops, None]:
            task = Tracking()
            fit = quiet(
                epochs=3, batch_size=8, run_dir=tmp_path / name, resume="auto", checkpoint=True
            )
            fit.on(
                "step_end",
                lambda run, out, at=stop: run.stop("x") if run.progress.step == at else None,
            )
            fit.run(task)
        found.append(task.all)
    assert found[0] == found[1]
    assert len(found[0]) == 3


def two_ranks(make):
    """The states of two ranks, and the metric that saw the batches of both in order."""
    parts, whole = [torch.nn.ModuleDict({"m": make()}) for _ in range(2)], make()
    logits, target, _ = scores(24)[:]
    for index in range(4):
        batch = slice(index * 6, index * 6 + 6)
        for metric in (parts[index % 2]["m"], whole):
            metric.update(logits[batch].softmax(-1), target[batch])
    own = [kept_state(part, lambda value: [value])["ranks"][0] for part in parts]
    return {"trackers": {}, "ranks": own}, whole


@pytest.mark.parametrize("kind", ["accuracy", "group", "list", "sum"])
def test_another_number_of_ranks_continues_with_the_state_of_all(kind):
    saved, whole = two_ranks(KINDS[kind])
    first, second, third = (torch.nn.ModuleDict({"m": KINDS[kind]()}) for _ in range(3))
    load_kept_state(first, saved, 0, 1)
    expected, found = whole.compute(), first["m"].compute()
    for name in expected if isinstance(expected, dict) else ():
        assert torch.equal(found[name], expected[name])
    assert isinstance(expected, dict) or torch.equal(found, expected)
    load_kept_state(second, saved, 1, 3)
    parts = [p for p in second.modules() if isinstance(p, torchmetrics.Metric)]
    assert all(part._update_count == 0 for part in parts)  # rank 0 has it all
    load_kept_state(third, saved, 1, 2)
    own, again = saved["ranks"][1], kept_state(third, lambda value: [value])["ranks"][0]
    assert {n: s["counters"] for n, s in own.items()} == {
        n: s["counters"] for n, s in again.items()
    }


def test_states_that_cannot_be_merged_are_told():
    part = torch.nn.ModuleDict({"m": torchmetrics.PearsonCorrCoef()})
    part["m"].update(torch.rand(9), torch.rand(9))
    own = kept_state(part, lambda value: [value])["ranks"][0]
    with pytest.warns(LoopkitWarning, match=r"the metric m \(PearsonCorrCoef\) starts again"):
        load_kept_state(part, {"ranks": [own, own]}, 0, 1, "here")
    assert part["m"]._update_count == 0


def test_a_trial_leaves_no_trace_in_the_metrics():
    part = torch.nn.ModuleDict({"m": accuracy(), "n": torchmetrics.MeanMetric()})
    logits, target, _ = scores(6)[:]
    part["m"].update(logits, target)
    before = float(part["m"].compute())
    with preserved_metrics(part):
        part["m"].update(-logits, target)
        part["n"].update(3.0)
    assert float(part["m"].compute()) == before
    assert part["n"]._update_count == 0
