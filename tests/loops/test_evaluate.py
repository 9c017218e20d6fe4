"""Evaluation and prediction: exact means, metrics by name, every sample once, no trace left in
training.
"""

from __future__ import annotations

import gc
from itertools import count

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from loopkit.errors import MetricError
from tests.support import Tiny, digest, points, quiet


class Measured(Tiny):
    def metrics(self):
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

        return {
            "accuracy": MulticlassAccuracy(3, average="micro"),
            "by": {"class": MulticlassConfusionMatrix(3)},
            "group": MetricCollection({"top2": MulticlassAccuracy(3, top_k=2, average="micro")}),
        }


def whole(task, data):
    x, y = data[:]
    task.eval()
    with torch.no_grad():
        logits = task.net(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(1) == y).double().mean())


@pytest.mark.parametrize("batch_size", [1, 7, 20, 100])
def test_loss_and_metrics_are_those_of_the_whole_set_at_any_batch_size(batch_size):
    task = Measured()
    loss, accuracy = whole(task, points(20, seed=2))
    found = quiet(eval_batch_size=batch_size).evaluate(task)
    assert found["eval/loss"] == pytest.approx(loss, rel=1e-6)
    assert found["eval/accuracy"] == pytest.approx(accuracy, abs=1e-7)
    assert found["eval/group/top2"] >= found["eval/accuracy"]
    assert {"eval/runtime", "eval/samples_per_second"} <= set(found)
    assert not any("class" in name for name in found)  # a matrix is no scalar


def test_a_weighted_loss_is_averaged_by_its_weights():
    class Tokens(Tiny):
        def eval_step(self, batch):
            x, y = batch
            kept = y != 0
            return {"loss": F.cross_entropy(self.net(x)[kept], y[kept]), "weight": kept.sum()}

    task = Tokens()
    x, y = points(20, seed=2)[:]
    task.eval()
    expected = float(F.cross_entropy(task.net(x)[y != 0], y[y != 0]).detach())
    assert quiet(eval_batch_size=3).evaluate(task)["eval/loss"] == pytest.approx(expected, rel=1e-6)


def test_several_sets_have_names():
    class Two(Measured):
        def eval_data(self):
            return {"near": points(20, seed=2), "far": points(10, seed=5)}

    found = quiet().evaluate(Two())
    assert {"eval/near/loss", "eval/far/loss", "eval/near/accuracy", "eval/far/accuracy"} <= set(
        found
    )
    assert found["eval/near/loss"] != found["eval/far/loss"]


def test_compute_metrics_sees_every_sample_once_in_order():
    class Whole(Tiny):
        def eval_step(self, batch):
            x, y = batch
            return {
                "preds": self.net(x),
                "target": y,
                "inputs": x,
                "text": [f"{v:.3f}" for v in x[:, 0].tolist()],
            }

        def compute_metrics(self, outputs):
            preds, target = outputs
            assert isinstance(preds, np.ndarray)
            x, y = points(20, seed=2)[:]
            assert (target == y.numpy()).all()
            assert (outputs.inputs == x.numpy()).all()
            assert outputs.text[3] == f"{float(x[3, 0]):.3f}"
            with pytest.raises(AttributeError, match="eval_step returned no 'losses'"):
                _ = outputs.losses
            return {"right": (preds.argmax(1) == target).mean(), "nested": {"count": len(target)}}

    found = quiet(eval_batch_size=6).evaluate(Whole())
    assert found["eval/nested/count"] == 20
    assert 0 <= found["eval/right"] <= 1


def test_ragged_outputs_are_padded_with_minus_100():
    class Ragged(Tiny):
        def eval_step(self, batch):
            size = len(batch[0])
            return {"preds": torch.ones(size, size), "target": batch[1]}

        def compute_metrics(self, outputs):
            assert outputs.preds.shape == (20, 6)
            return {"padding": (outputs.preds == -100).sum()}

    assert quiet(eval_batch_size=6).evaluate(Ragged())["eval/padding"] == 2 * 4


def test_evaluation_leaves_no_trace_in_training():
    runs = []
    for every in ("never", "1 steps"):
        for rng in ("counter", "stream"):
            task = Measured()
            task.net[2].eval()  # a frozen part stays as it is
            quiet(
                epochs=2, batch_size=10, eval_every=every, rng=rng, eval_first=every != "never"
            ).run(task)
            runs.append((rng, digest(task.state_dict())))
    assert runs[0] == runs[2]
    assert runs[1] == runs[3]
    assert runs[0][1] != runs[1][1]


@pytest.mark.parametrize("batch_size", [1, 7, 50])
def test_predictions_come_in_order_each_once(batch_size):
    task = Tiny()
    data = points(33, seed=4)
    task.eval()
    expected = task.net(data[:][0]).argmax(1)
    assert torch.equal(quiet(eval_batch_size=batch_size).predict(task, data), expected)
    kept: list[torch.Tensor] = []
    assert quiet(eval_batch_size=batch_size).predict(task, data, writer=kept.append) is None
    assert torch.equal(torch.cat(kept), expected)


def test_predictions_may_be_nested_or_strings():
    class Nested(Tiny):
        def predict_step(self, batch):
            logits = self.net(batch[0])
            return {
                "class": logits.argmax(1),
                "text": [str(int(i)) for i in logits.argmax(1)],
                "pair": (logits, logits),
            }

    found = quiet(eval_batch_size=6).predict(Nested(), points(20))
    assert found["class"].shape == (20,)
    assert found["text"] == [str(int(i)) for i in found["class"]]
    assert found["pair"][0].shape == (20, 3)


def test_evaluate_and_predict_with_a_checkpoints_weights(tmp_path):
    trained = Tiny()
    result = quiet(epochs=5, run_dir=tmp_path, checkpoint=True).run(trained)
    for where in (tmp_path, result.checkpoint):
        found = quiet().evaluate(Tiny(), checkpoint=where)
        assert found["eval/loss"] == result.metrics["eval/loss"]
    assert torch.equal(quiet().predict(Tiny(), checkpoint=tmp_path), quiet().predict(trained))


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"kind": "good"}, "returned 'good' as 'kind': give a number or an array"),
        ({"loss": 5.0}, "returned a 'loss', and so did .*eval_step: give one of them another name"),
    ],
)
def test_what_compute_metrics_may_not_return_is_named(found, told):
    class Own(Tiny):
        def compute_metrics(self, outputs):
            return found

    with pytest.raises(MetricError, match=told):
        quiet().evaluate(Own())


def test_no_tensor_of_a_batch_outlives_it():
    """Small tensors that stay between large ones split the heap: memory grew with the samples."""
    alive, numbers = {}, count(1)

    class Watched(Tiny):
        def eval_step(self, batch):
            number = next(numbers)
            if number in (3, 60):  # a look at every object of the process takes long
                alive[number] = sum(type(each) is torch.Tensor for each in gc.get_objects())
            return {**super().eval_step(batch), "score": batch[0].mean()}

    quiet(eval_batch_size=1).evaluate(Watched(), points(60, seed=2))
    assert alive[60] <= alive[3] + 4
