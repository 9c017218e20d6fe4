"""Evaluation sets and the test set: a step knows its set, and its scalars are logged by set."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset
from torchmetrics import MeanMetric

from loopkit import Checkpoint, Fit, Hook, Task
from loopkit.errors import DataError, MetricError, TaskError
from tests.support import Tiny, points, quiet


class Noting(Tiny):
    """Notes its set in every place that may ask for it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def note(self, where):
        self.seen.append((where, self.eval_set))

    def eval_step(self, batch):
        self.note("step")
        return super().eval_step(batch)

    def metrics(self):
        self.note("metrics")
        return {}

    def compute_metrics(self, outputs):
        self.note("whole")
        return {"samples": len(outputs.preds)}

    def on_eval_start(self, run):
        self.note("start")

    def on_eval_end(self, run, metrics):
        self.note("end")

    def test_data(self):
        return {"a": points(5, seed=6), "b": points(7, seed=7)}


class Listening(Hook):
    def __init__(self):
        self.seen = []

    def on_eval_start(self, run):
        self.seen.append(run.task.eval_set)

    on_eval_end = on_eval_step_end = lambda self, run, values: self.seen.append(run.task.eval_set)


def test_a_step_and_a_hook_know_which_set_is_measured():
    task, hook = Noting(), Listening()
    found = quiet(hooks=[hook]).test(task)
    assert (found["test/a/samples"], found["test/b/samples"]) == (5, 7)
    assert {"test/a/loss", "test/b/loss", "test/runtime", "test/samples_per_second"} <= set(found)
    assert not any(name.startswith("eval") for name in found)
    inside = [(where, f"test/{name}") for name in "ab" for where in ("metrics", "step", "whole")]
    assert task.seen == [("start", "test"), *inside, ("end", "test")]
    assert hook.seen == ["test", "test/a", "test/b", "test"]
    assert task.eval_set == ""
    task.seen.clear()
    quiet(epochs=1).run(task)
    assert {name for _, name in task.seen} == {"eval"}
    task.seen.clear()
    quiet().evaluate(task, {"far": points(4)})
    assert [name for _, name in task.seen] == ["eval", "eval/far", "eval/far", "eval/far", "eval"]


def test_the_test_step_falls_back_to_the_eval_step():
    class Own(Noting):
        def test_step(self, batch):
            assert self.eval_set == "test"
            return {"loss": torch.tensor(3.0), "preds": batch[0]}

        def test_data(self):
            return points(9, seed=6)

    assert quiet().test(Own())["test/loss"] == 3
    task = Noting()
    alone = quiet().evaluate(task, points(5, seed=6))
    assert quiet().test(task, points(5, seed=6))["test/loss"] == alone["eval/loss"]
    assert quiet().evaluate(Own())["eval/loss"] != 3


def test_a_test_takes_a_checkpoint_and_training_never_sees_its_data(tmp_path):
    class Guarded(Noting):
        def test_data(self):
            raise AssertionError("asked for")

    trained = Guarded()
    quiet(epochs=2, checkpoint=True, run_dir=tmp_path).run(trained)
    found = quiet().test(Noting(), checkpoint=tmp_path)
    assert found["test/a/loss"] == quiet().evaluate(trained, points(5, seed=6))["eval/loss"]


def test_a_task_without_a_test_set_or_a_step_says_so():
    with pytest.raises(DataError, match=r"Tiny.test_data\(\) returned nothing to evaluate on"):
        quiet().test(Tiny())

    class NoStep(Noting):
        eval_step = Task.eval_step

    with pytest.raises(TaskError, match="NoStep has no eval_step"):
        quiet().test(NoStep())

    class Nothing(Noting):
        def test_step(self, batch):
            return None

    with pytest.raises(TaskError, match=r"Nothing.test_step returned NoneType"):
        quiet().test(Nothing())

    class Wants(Noting):
        def metrics(self):
            return {"mean": MeanMetric()}

        def test_step(self, batch):
            return {}

    with pytest.raises(MetricError, match=r"but Wants.test_step returned"):
        quiet().test(Wants())


class Scalars(Tiny):
    """Logs and returns scalars, which differ from batch to batch."""

    def eval_step(self, batch):
        x = batch[0]
        self.log("mine", x.mean())
        self.log(f"{self.eval_set}/by_name", x.mean())
        self.log("eval/kind", float(x.mean()))
        self.log("most", x.max(), reduce="max")
        return {
            "loss": x.mean(),
            "kld": x.mean(),
            "count": len(x),
            "preds": x,
            "squeezed": x.squeeze(),
            "text": "a",
        }


def numbers(count):
    return TensorDataset(torch.arange(float(count))[:, None])


@pytest.mark.parametrize("size", [1, 3, 10])
def test_scalars_are_averaged_over_samples_and_logged_by_set(size):
    found = quiet(eval_batch_size=size).evaluate(Scalars(), numbers(7))
    for name in ("loss", "mine", "by_name", "kind", "kld"):
        assert found[f"eval/{name}"] == pytest.approx(3.0), name
    assert found["eval/most"] == 6
    assert "eval/preds" not in found
    assert "eval/text" not in found
    assert size == 1 or "eval/squeezed" not in found  # a scalar in the last batch only
    two = quiet(eval_batch_size=size).evaluate(Scalars(), {"a": numbers(7), "b": numbers(3)})
    for name in ("mine", "by_name", "kind", "kld"):
        assert two[f"eval/a/{name}"] == pytest.approx(3.0), name
        assert two[f"eval/b/{name}"] == pytest.approx(1.0), name
    tested = quiet(eval_batch_size=size).test(Scalars(), numbers(7))
    assert tested["test/by_name"] == pytest.approx(3.0)


def test_scalars_are_weighted_as_the_loss_and_can_be_monitored(tmp_path):
    class Weighted(Tiny):
        def eval_step(self, batch):
            return {"loss": batch[0].mean(), "kld": batch[0].mean(), "weight": batch[0].sum()}

    found = quiet(eval_batch_size=2).evaluate(Weighted(), numbers(5))
    assert found["eval/kld"] == found["eval/loss"] == pytest.approx((0.5 + 2.5 * 5 + 16) / 10)

    class Monitored(Tiny):
        def eval_step(self, batch):
            return {**super().eval_step(batch), "kld": float(len(batch[0]))}

    result = Fit(
        epochs=2, progress=False, run_dir=tmp_path, checkpoint=Checkpoint(best="eval/kld:min")
    ).run(Monitored())
    assert result.best["value"] == 20
    assert [row["eval/kld"] for row in result.history if "eval/kld" in row] == [20, 20]


def test_what_a_metric_takes_is_not_logged_again():
    class Taken(Tiny):
        def eval_step(self, batch):
            return {"value": batch[0].mean(), "other": batch[0].mean()}

        def metrics(self):
            return {"mean": MeanMetric()}

    found = quiet().evaluate(Taken(), numbers(4))
    assert {"eval/mean", "eval/other"} <= set(found)
    assert "eval/value" not in found


def test_a_loss_of_some_batches_only_is_refused():
    class Some(Tiny):
        def eval_step(self, batch):
            return {"loss": batch[0].mean()} if batch[0][0] == 0 else {"kld": 1.0}

    with pytest.raises(TaskError, match="returned a 'loss' for some batches only"):
        quiet(eval_batch_size=2).evaluate(Some(), numbers(4))
