from __future__ import annotations

import pytest
import torch

from loopkit import Checkpoint, Hook
from loopkit.checkpoint import load_snapshot
from loopkit.errors import CheckpointError, OptionError
from loopkit.hooks import EMA, SWA
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


@pytest.fixture
def two(tmp_path):
    """Two hooks of one run, one of another class between them, and the checkpoint of the run."""
    slow, fast = EMA(0.99), EMA(0.5)
    hooks = [slow, SWA(start=1, every=1), fast]
    fit = quiet(steps=5, batch_size=8, hooks=hooks, run_dir=tmp_path, checkpoint=True)
    return slow, fast, fit.run(Tiny()).checkpoint


def holds(task, ema):
    averages = ema.state_dict()["averages"]
    return all(torch.equal(value, weights(task)[name]) for name, value in averages.items())


def test_each_of_two_takes_its_own_averages_from_a_checkpoint(two):
    for ema in two[:2]:
        task = Tiny()
        ema.apply(task, two[2])
        assert holds(task, ema)


def test_an_evaluation_with_one_of_them_does_not_change_which_averages_are_its_own(two):
    _, fast, path = two
    quiet(batch_size=8, hooks=[fast]).evaluate(Tiny())
    task = Tiny()
    fast.apply(task, path)
    assert holds(task, fast)


def test_of_two_averages_a_hook_from_elsewhere_must_choose(two, tmp_path):
    slow, fast, path = two
    elsewhere = EMA()
    quiet(steps=1, batch_size=8, hooks=[elsewhere]).run(Tiny())
    for ema in (EMA(), elsewhere):
        with pytest.raises(
            CheckpointError,
            match=r"holds the states of 2 EMA hooks: there is EMA and EMA-2\..*name=",
        ):
            ema.apply(Tiny(), path)
    for ema, name in ((slow, "EMA"), (fast, "EMA-2")):
        task = Tiny()
        EMA().apply(task, path, name=name)
        assert holds(task, ema)
    with pytest.raises(CheckpointError, match="no state of a hook EMA-3: there is EMA and EMA-2"):
        EMA().apply(Tiny(), path, name="EMA-3")
    with pytest.raises(CheckpointError, match="no averages of a hook Trail"):
        quiet(steps=1, hooks=[Trail()], run_dir=tmp_path / "t", checkpoint=True).run(Tiny())
        EMA().apply(Tiny(), tmp_path / "t", name="Trail")


def test_the_second_of_a_run_is_not_looked_for_under_the_name_of_the_only_one(two, tmp_path):
    only = quiet(steps=2, batch_size=8, hooks=[EMA()], run_dir=tmp_path / "1", checkpoint=True)
    path = only.run(Tiny()).checkpoint
    with pytest.raises(CheckpointError, match="no state of a hook EMA-2: there is EMA"):
        two[1].apply(Tiny(), path)
    without = quiet(steps=2, batch_size=8, run_dir=tmp_path / "2", checkpoint=True).run(Tiny())
    with pytest.raises(CheckpointError, match="holds no state of a hook EMA"):
        EMA().apply(Tiny(), without.checkpoint)


def test_each_of_two_is_resumed_with_its_own(tmp_path):
    def train(folder, stop_at=None):
        hooks = [EMA(0.99), EMA(0.5)]
        options = {"steps": 10, "batch_size": 8, "run_dir": tmp_path / folder, "hooks": hooks}
        fit = quiet(**options, checkpoint=True, resume="auto")
        fit.on("step_end", lambda run, out: run.progress.step == stop_at and run.stop("test"))
        fit.run(Tiny())
        return [digest(hook.state_dict()["averages"]) for hook in hooks]

    whole = train("whole")
    train("parts", stop_at=4)
    assert train("parts") == whole
    assert whole[0] != whole[1]


def test_apply_at_end_with_load_best_takes_each_hook_s_own_averages(tmp_path):
    task, trail = Tiny(), Trail()
    hooks = [trail, EMA(0.99), EMA(0.5, evaluate=False, apply_at_end=True)]
    best = Checkpoint(every="1000 steps", best="eval/loss:min", load_best=True)
    options = {"steps": 6, "batch_size": 8, "eval_every": 6, "run_dir": tmp_path}
    quiet(**options, checkpoint=best, hooks=hooks).run(task)
    assert close(weights(task), by_hand(trail.start, trail.after, [0.5] * 6))
