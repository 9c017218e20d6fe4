from __future__ import annotations

import pytest
import torch

from loopkit import Checkpoint, Hook
from loopkit.checkpoint import load_snapshot
from loopkit.errors import CheckpointError, OptionError
from loopkit.hooks import EMA
from tests.hooks.runs import Normed, check_resume, weights
from tests.support import Tiny, digest, quiet


class Trail(Hook):
    """The weights after each step, and those seen while evaluating."""

    def __init__(self):
        self.after, self.evaluated = [], []

    def on_fit_start(self, run):
        self.start = weights(run.task)

    def on_step_end(self, run, out):
        self.after.append(weights(run.task))

    def on_eval_step_end(self, run, outputs):
        self.evaluated.append(weights(run.task))


def by_hand(start, after, decays):
    average = {name: value.double() for name, value in start.items()}
    for step, decay in zip(after, decays):
        average = {
            name: decay * value + (1 - decay) * step[name].double()
            for name, value in average.items()
        }
    return average


def close(found, expected):
    return all(
        torch.allclose(found[name].double(), value, atol=1e-6) for name, value in expected.items()
    )


@pytest.mark.parametrize(
    ("arguments", "decays"),
    [
        ({"decay": 0.9}, [0.9] * 12),
        ({"decay": 0.9, "warmup": True}, [min(0.9, (1 + n) / (10 + n)) for n in range(12)]),
    ],
)
def test_the_average_is_the_formula(arguments, decays):
    trail, ema = Trail(), EMA(**arguments)
    quiet(steps=12, batch_size=8, hooks=[trail, ema]).run(Tiny())
    assert close(ema.state_dict()["averages"], by_hand(trail.start, trail.after, decays))
    assert not close(
        ema.state_dict()["averages"], {n: v.double() for n, v in trail.after[-1].items()}
    )


def test_every_leaves_steps_out():
    trail, ema = Trail(), EMA(0.9, every=3)
    quiet(steps=12, batch_size=8, hooks=[trail, ema]).run(Tiny())
    assert ema.updates == 4
    assert close(ema.state_dict()["averages"], by_hand(trail.start, trail.after[2::3], [0.9] * 4))


def test_training_is_the_same_with_and_without():
    plain, averaged = Tiny(), Tiny()
    quiet(steps=12, batch_size=8, eval_every=2).run(plain)
    quiet(steps=12, batch_size=8, eval_every=2, hooks=[EMA(0.9)]).run(averaged)
    assert digest(plain.state_dict()) == digest(averaged.state_dict())


def test_evaluations_see_the_averages_and_training_its_own_weights():
    trail, ema, task = Trail(), EMA(0.9), Tiny()
    result = quiet(steps=12, batch_size=8, eval_every="12 steps", hooks=[trail, ema]).run(task)
    averages = ema.state_dict()["averages"]
    assert all(torch.equal(trail.evaluated[0][name], value) for name, value in averages.items())
    assert all(torch.equal(value, trail.after[-1][name]) for name, value in weights(task).items())
    ema.apply(task)
    assert quiet(batch_size=8).evaluate(task)["eval/loss"] == result.metrics["eval/loss"]


def test_evaluate_false_measures_the_weights():
    trail = Trail()
    quiet(steps=4, batch_size=8, eval_every="4 steps", hooks=[trail, EMA(0.5, evaluate=False)]).run(
        Tiny()
    )
    assert all(
        torch.equal(value, trail.after[-1][name]) for name, value in trail.evaluated[0].items()
    )


def test_the_weights_come_back_when_the_evaluation_raises():
    class Broken(Tiny):
        def eval_step(self, batch):
            raise ZeroDivisionError

    task, trail = Broken(), Trail()
    with pytest.raises(ZeroDivisionError):
        quiet(steps=4, batch_size=8, eval_every="4 steps", hooks=[trail, EMA(0.5)]).run(task)
    assert all(torch.equal(value, trail.after[-1][name]) for name, value in weights(task).items())


def test_apply_at_end_leaves_the_averages_and_the_buffers_in_the_task():
    task, ema = Normed(), EMA(0.9, apply_at_end=True)
    result = quiet(steps=12, batch_size=8, eval_every="12 steps", hooks=[ema]).run(task)
    assert all(
        torch.equal(value, weights(task)[name])
        for name, value in ema.state_dict()["averages"].items()
    )
    assert quiet(batch_size=8).evaluate(task)["eval/loss"] == result.metrics["eval/loss"]


def test_with_load_best_the_averages_of_the_best_checkpoint_stay(tmp_path):
    values = iter([0.5, 0.1, 0.7])

    class Scored(Tiny):
        def compute_metrics(self, outputs):
            return {"score": next(values)}

    task, trail, ema = Scored(), Trail(), EMA(0.9, apply_at_end=True)
    best = Checkpoint(every="1000 steps", best="eval/score:min", load_best=True)
    quiet(
        steps=9, batch_size=8, eval_every=3, run_dir=tmp_path, checkpoint=best, hooks=[trail, ema]
    ).run(task)
    assert close(weights(task), by_hand(trail.start, trail.after[:6], [0.9] * 6))


@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate": 2}, {"rng": "stream"}, {"precision": "bf16-true"}, {"task": Normed}],
    ids=str,
)
def test_resume_is_bit_identical(options, tmp_path):
    check_resume(lambda: EMA(0.9, every=2, warmup=True), tmp_path, (1, 6, 9), **options)


def test_averages_of_half_precision_weights_are_kept_in_single():
    ema = EMA(0.999)
    quiet(steps=3, batch_size=8, precision="bf16-true", hooks=[ema]).run(Tiny())
    assert {value.dtype for value in ema.state_dict()["averages"].values()} == {torch.float32}


def test_averages_can_be_taken_from_a_checkpoint(tmp_path):
    ema = EMA(0.9)
    result = quiet(steps=5, batch_size=8, hooks=[ema], run_dir=tmp_path, checkpoint=True).run(
        Tiny()
    )
    task = Tiny()
    EMA().apply(task, result.checkpoint)
    assert all(
        torch.equal(value, weights(task)[name])
        for name, value in ema.state_dict()["averages"].items()
    )


def test_a_save_in_the_background_holds_the_averages_of_its_own_step(tmp_path):
    trail, ema = Trail(), EMA(0.9)
    every = Checkpoint(every="3 steps", keep=None)
    quiet(steps=12, batch_size=8, run_dir=tmp_path, checkpoint=every, hooks=[trail, ema]).run(
        Tiny()
    )
    paths = sorted((tmp_path / "checkpoints").iterdir())
    saved = {
        load_snapshot(path).meta["step"]: path for path in paths if path.name.startswith("step")
    }
    assert sorted(saved) == [3, 6, 9, 12]
    for step, path in saved.items():
        task = Tiny()
        ema.apply(task, path)
        assert close(weights(task), by_hand(trail.start, trail.after[:step], [0.9] * step)), step


def test_a_checkpoint_of_other_parameters_is_refused():
    ema = EMA(0.9)
    ema.load_state_dict({"updates": 1, "averages": {"other": torch.zeros(1)}})
    with pytest.raises(
        CheckpointError, match=r"EMA's averages of other parameters.*net\.0\.bias.*without EMA"
    ):
        quiet(steps=1, hooks=[ema]).run(Tiny())


def test_a_hook_added_at_a_resume_starts_from_the_weights(tmp_path):
    fit = quiet(steps=5, batch_size=8, run_dir=tmp_path, checkpoint=True)
    fit.on("step_end", lambda run, out: run.stop("test") if run.progress.step == 3 else None)
    fit.run(Tiny())
    ema, trail = EMA(0.9), Trail()
    fit = quiet(
        steps=5, batch_size=8, run_dir=tmp_path, checkpoint=True, resume="auto", hooks=[trail, ema]
    )
    fit.run(Tiny())
    assert ema.updates == 2
    assert close(ema.state_dict()["averages"], by_hand(trail.start, trail.after, [0.9] * 2))


def test_nothing_averaged_yet_is_said():
    with pytest.raises(CheckpointError, match="averaged nothing yet"):
        EMA().apply(Tiny())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"decay": 1.0}, "decay=1.0"),
        ({"decay": 0}, "decay=0"),
        ({"every": "3 min"}, "every='3 min'"),
        ({"every": "often"}, "every=.*'often'"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(OptionError, match=named):
        EMA(**arguments)
