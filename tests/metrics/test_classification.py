"""Confidence and PerClassAccuracy against a loop over samples."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import loopkit.metrics
from loopkit.metrics import Confidence, PerClassAccuracy


def batches(count=50, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator) * 3
    target = torch.randint(0, classes, (count,), generator=generator)
    target[::7] = -100
    return logits, target


@pytest.mark.parametrize("size", [1, 8, 50])
def test_confidences_are_those_of_a_loop_over_samples(size):
    logits, target = batches()
    metric = Confidence().set_dtype(torch.float64)
    for batch in zip(logits.split(size), target.split(size)):
        metric.update(*batch)
    kept = {"right": [], "wrong": []}
    for row, wanted in zip(logits.double(), target):
        if wanted != -100:
            part = "right" if row.argmax() == wanted else "wrong"
            kept[part].append(row.softmax(0).max().item())
    kept["all"] = kept["right"] + kept["wrong"]
    assert {k: v.item() for k, v in metric.compute().items()} == pytest.approx(
        {part: sum(values) / len(values) for part, values in kept.items()}, rel=1e-12
    )


def test_probabilities_are_taken_as_they_are_and_nothing_wrong_is_nan():
    metric = Confidence(logits=False)
    metric.update(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([1, 0]))
    found = metric.compute()
    assert (found["right"], found["all"]) == (0.625, 0.625)
    assert math.isnan(found["wrong"])


def test_ignored_entries_may_hold_anything():
    metric = Confidence()
    metric.update(torch.tensor([[0.0, 9.0], [math.nan, 1.0]]), torch.tensor([1, -100]))
    assert 0.99 < metric.compute()["all"] < 1


@pytest.mark.parametrize("scores", [True, False])
def test_each_class_has_the_share_of_its_own_samples(scores):
    logits, target = batches(classes=3)
    metric = PerClassAccuracy({"0": "cat", "1": "dog", "2": "été"})
    for preds, wanted in zip(logits.split(9), target.split(9)):
        metric.update(preds if scores else preds.argmax(-1), wanted)
    found = metric.compute()
    assert list(found) == ["cat", "dog", "été"]
    for number, value in enumerate(found.values()):
        own = logits[target == number].argmax(-1)
        assert value.item() == pytest.approx((own == number).float().mean().item())


def test_a_class_without_samples_is_nan():
    metric = PerClassAccuracy(["here", "absent"])
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    found = metric.compute()
    assert found["here"] == 0.5
    assert math.isnan(found["absent"])


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="two classes have the name 'x'"):
        PerClassAccuracy(["x", "x"])
    for metric in (Confidence(), PerClassAccuracy(["x"])):
        with pytest.raises(ValueError, match=r"\[2, 3\] do not fit target of shape \[3\]"):
            metric.update(torch.zeros(2, 3), torch.zeros(3))


def test_torchmetrics_is_imported_when_a_metric_is_asked_for():
    code = (
        "import sys, loopkit, loopkit.metrics; loopkit.Fit; assert 'torchmetrics' not in sys.modules; "
        "loopkit.metrics.SpanF1; assert 'torchmetrics' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", loopkit.metrics.__all__)
def test_every_metric_is_there_and_is_torchmetrics(name):
    import torchmetrics

    assert issubclass(getattr(loopkit.metrics, name), torchmetrics.Metric)
    assert name in dir(loopkit.metrics)
