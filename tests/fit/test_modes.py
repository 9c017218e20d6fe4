"""Train and eval modes are the user's: the engine changes none that it does not put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loopkit import EvalLoop, Fit, Hook, PredictLoop
from loopkit.errors import LoopkitWarning
from tests.support import Tiny, quiet


class Teacher(Tiny):
    """Holds a frozen part in eval mode, and a BatchNorm whose statistics are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.teacher.requires_grad_(False).eval()
        self.norm = nn.BatchNorm1d(8)
        self.norm.eval()
        self.seen: list[tuple[bool, bool, bool, bool]] = []

    def train_step(self, batch: Any) -> Any:
        self.seen.append(
            (self.training, self.net.training, self.teacher[0].training, self.norm.training)
        )
        x, y = batch
        self.teacher(x)
        return super().train_step((self.norm(x), y))


def modes(task: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in task.named_modules()}


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_a_part_in_eval_mode_stays_there_in_every_step(strategy):
    task = Teacher()
    before = modes(task)
    quiet(epochs=2, eval_every="2 steps", strategy=strategy).run(task)
    assert set(task.seen) == {(True, True, False, False)}
    assert task.teacher[0].running_mean.abs().sum() == 0, "the teacher itself is unchanged"
    assert modes(task) == before


def test_a_run_after_an_evaluation_trains_in_the_same_modes():
    task, fit = Teacher(), quiet(steps=2, eval_every="never")
    fit.evaluate(task)
    fit.predict(task)
    fit.run(task)
    fit.run(task)
    assert set(task.seen) == {(True, True, False, False)}


def test_a_task_in_eval_mode_as_a_whole_is_trained():
    task = Teacher()
    task.eval()
    quiet(steps=2, eval_every="never").run(task)
    assert task.seen[0][:2] == (True, True)


def test_dropout_of_a_trained_part_in_eval_mode_is_reported():
    class Loaded(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.net.eval()  # as from_pretrained leaves a model

    with pytest.warns(
        LoopkitWarning, match=r"Loaded.net is trained and in eval mode.*net.train\(\)"
    ):
        quiet(steps=1, eval_every="never").run(Loaded())


def test_whatever_an_evaluation_changes_is_put_back():
    class Own(EvalLoop):
        def run(self, run: Any, data: Any) -> dict[str, float]:
            run.task.eval()
            torch.manual_seed(5)
            return {"eval/loss": 1.0}

    class Samples(Hook):
        def on_eval_start(self, run: Any) -> None:
            run.task.net.eval()

        def on_eval_end(self, run: Any, metrics: Any) -> None:
            run.task.eval()

    for options in ({"eval": Own()}, {"hooks": [Samples()]}):
        task = Teacher()
        quiet(steps=6, eval_every=2, **options).run(task)
        assert set(task.seen) == {(True, True, False, False)}
        before = modes(task)
        quiet(**options).evaluate(task)
        assert modes(task) == before


def test_a_predict_loop_of_ones_own_leaves_the_modes_alone():
    class Own(PredictLoop):
        def run(self, run: Any, source: Any, writer: Any = None) -> Any:
            run.task.eval()
            return 7

    task = Teacher()
    before = modes(task)
    assert Fit(predict=Own(), progress=False).predict(task, data=task.train_data()) == 7
    assert modes(task) == before
