"""What a metric gets: by name, by keys of its own, inside wrappers, sums and collections."""

from __future__ import annotations

import pytest
import torchmetrics
from torchmetrics import wrappers

from loopkit.errors import MetricError
from tests.metric_tasks import Wrapped, accuracy, scores
from tests.support import quiet


class Measuring(Wrapped):
    def __init__(self, metrics, outputs=None):
        super().__init__()
        self.made, self.outputs = metrics, outputs

    def metrics(self):
        return self.made() if callable(self.made) else self.made

    def eval_step(self, batch):
        return self.outputs(batch) if self.outputs else super().eval_step(batch)


def measured(metrics, outputs=None, size=5):
    found = quiet(eval_batch_size=size).evaluate(Measuring(metrics, outputs))
    return {name.removeprefix("eval/"): value for name, value in found.items()}


def by_hand(preds, target):
    return float((preds.argmax(1) == target).double().mean())


def test_every_wrapper_and_composition_gives_the_value_of_the_whole_set():
    logits, target, value = scores(23)[:]
    right, wrong = by_hand(logits, target), by_hand(-logits, target)
    found = quiet(eval_batch_size=5).evaluate(Wrapped())
    f1 = float(torchmetrics.classification.MulticlassF1Score(3)(logits, target))
    expected = {
        "classwise/multiclassaccuracy_1": by_hand(logits[target == 1], target[target == 1]),
        "minmax/raw": right,
        "minmax/max": right,
        "tracker": right,
        "transformed": wrong,
        "running": float(value[10:].mean()),
        "sum": right + f1,
        "mixed": right + float(value.mean()),
        "scaled": 2 * right,
        "minmax of a sum/raw": 2 * right,
        "group/a": right,
        "group/b_c": right,
        "group/b_d": f1,
        "group/e": wrong,
        "tasks/x": right,
        "tasks/y": 4.0,
    }
    for name, number in expected.items():
        assert found[f"eval/{name}"] == pytest.approx(number, abs=1e-6), name
    assert 0.2 < found["eval/bootstrap/mean"] < 1
    assert found["eval/bootstrap/std"] > 0


def test_wrappers_of_wrappers_and_of_sums_work_too():
    found = measured(
        lambda: {
            "a": {"b": wrappers.MinMaxMetric(wrappers.LambdaInputTransformer(accuracy()))},
            "c": abs(accuracy() - 1) ** 2,
            "e": wrappers.MetricTracker(torchmetrics.MetricCollection([accuracy()])),
        }
    )
    right = by_hand(*scores(23)[:][:2])
    assert found["a/b/raw"] == found["e/MulticlassAccuracy"] == pytest.approx(right)
    assert found["c"] == pytest.approx((1 - right) ** 2, abs=1e-6)


def test_two_heads_are_measured_by_two_metrics():
    def step(batch):
        logits, target, _ = batch
        return {
            "preds_a": logits,
            "target_a": target,
            "b": {"preds": -logits, "target": target},
        }

    found = measured(
        lambda: {
            "a": (accuracy(), "preds_a", "target_a"),
            "b": {
                "accuracy": (accuracy(), "b/preds", "b/target"),
                "both": (torchmetrics.MetricCollection([accuracy()]), "b/preds", "b/target"),
                "sum": (accuracy() + accuracy(), "b/preds", "b/target"),
            },
        },
        step,
    )
    logits, target, _ = scores(23)[:]
    assert found["a"] == pytest.approx(by_hand(logits, target))
    assert found["b/accuracy"] == pytest.approx(by_hand(-logits, target))
    assert found["b/both/MulticlassAccuracy"] == found["b/accuracy"]
    assert found["b/sum"] == pytest.approx(2 * found["b/accuracy"])


def test_an_output_that_is_missing_is_named_with_the_way_to_name_others():
    with pytest.raises(MetricError, match=r"'m' \(MulticlassAccuracy\) asks for 'preds'.*\(metric, \"my_preds\", \"my_target\"\)"):  # fmt: skip
        measured({"m": accuracy()}, lambda batch: {"logits": batch[0]})
    with pytest.raises(MetricError, match="asks for 'b/target'"):
        measured({"m": (accuracy(), "b/preds", "b/target")}, lambda b: {"b": {"preds": b[0]}})
    with pytest.raises(MetricError, match=r"'m' .MinMaxMetric. asks for 'preds'"):
        measured({"m": wrappers.MinMaxMetric(accuracy())}, lambda batch: {"logits": batch[0]})


@pytest.mark.parametrize("bad", [(), (accuracy(), 3), ("preds", accuracy()), 3, None])
def test_what_is_no_metric_is_refused(bad):
    with pytest.raises(MetricError, match=r"metrics\(\)\['m'\] is a "):
        measured({"m": bad})


def test_a_metric_without_names_says_how_to_name_them():
    class Odd:
        def update(self, *args):
            self.seen = len(args)

        def reset(self):
            pass

        def compute(self):
            return self.seen

    with pytest.raises(MetricError, match="does not say what its update takes"):
        measured({"m": Odd()})
    assert measured({"m": (Odd(), "preds", "target")})["m"] == 2


def test_a_transformation_beside_a_metric_with_other_inputs_is_refused():
    group = torchmetrics.MetricCollection(
        {"a": wrappers.LambdaInputTransformer(accuracy()), "b": torchmetrics.MeanMetric()}
    )
    with pytest.raises(MetricError, match="give each metric a name of its own"):
        measured({"m": group})


@pytest.mark.parametrize("kind", ["plain", "sum", "group"])
def test_the_weight_of_the_loss_is_no_weight_of_a_metric(kind):
    def make():
        mean = torchmetrics.MeanMetric()
        if kind == "group":
            return {"m": torchmetrics.MetricCollection({"mean": mean})}
        return {"m": mean + 0 if kind == "sum" else mean}

    found = measured(make)
    plain = float(scores(23)[:][2].double().mean())
    assert found["m/mean" if kind == "group" else "m"] == pytest.approx(plain, abs=1e-6)


def test_a_weight_is_passed_where_it_is_named():
    def step(batch):
        return {"value": batch[2], "weight": len(batch[0]), "by": batch[2]}

    found = measured({"m": (torchmetrics.MeanMetric(), "value", "by")}, step)
    value = scores(23)[:][2].double()
    assert found["m"] == pytest.approx(float((value * value).sum() / value.sum()), abs=1e-6)


class Keeping(Wrapped):
    """Keeps its metrics from one evaluation to the next, as a LightningModule does."""

    def __init__(self):
        super().__init__()
        self.accuracy = accuracy()
        self.tracker = wrappers.MetricTracker(accuracy())
        self.bounds = wrappers.MinMaxMetric(accuracy())
        self.flip = 1

    def eval_step(self, batch):
        return {"preds": batch[0] * self.flip, "target": batch[1]}

    def metrics(self):
        return {"accuracy": self.accuracy, "tracker": self.tracker, "bounds": self.bounds}

    def on_eval_end(self, run, metrics):
        self.flip = -self.flip


def test_a_metric_that_the_task_keeps_starts_again_and_its_wrapper_remembers():
    task = Keeping()
    first, second = (quiet(eval_batch_size=5).evaluate(task) for _ in range(2))
    right, wrong = (by_hand(sign * scores(23)[:][0], scores(23)[:][1]) for sign in (1, -1))
    assert first["eval/accuracy"] == first["eval/tracker"] == pytest.approx(right)
    assert second["eval/accuracy"] == second["eval/tracker"] == pytest.approx(wrong)
    assert second["eval/bounds/raw"] == pytest.approx(wrong)
    assert second["eval/bounds/max"] == pytest.approx(right)
    assert float(task.tracker.best_metric()) == pytest.approx(right)
