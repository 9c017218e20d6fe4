from __future__ import annotations

import pytest

from loopkit.errors import MetricError, OptionError
from loopkit.hooks import EarlyStop
from tests.hooks.runs import go
from tests.support import Tiny, quiet


class Scripted(Tiny):
    """Evaluations give these values, one after the other."""

    values = [3.0, 2.0, 2.5, 2.4, float("nan"), 1.0, 0.5]

    def compute_metrics(self, outputs):
        return {"score": self.values[(self.calls - 1) % len(self.values)]}

    calls = 0

    def on_eval_start(self, run):
        self.calls = (
            run.progress.step
        )  # evaluated after every step: the value depends on nothing else


def scripted(metric, patience, **options):
    hook = EarlyStop(metric, patience, **options)
    fit = quiet(epochs=1, batch_size=8, eval_every=1, hooks=[hook])
    return fit.run(Scripted(56)), hook


def test_it_stops_after_patience_evaluations_without_a_gain_and_says_why():
    result, hook = scripted("eval/score:min", 3)
    assert (result.status, result.step) == ("stopped", 5)
    assert (hook.best, hook.best_step, hook.waited) == (2.0, 2, 3)
    assert "eval/score has not improved for 3 evaluations; its best is 2 at step 2" in result.reason


def test_patience_can_outlast_a_plateau():
    result, hook = scripted("eval/score:min", 4)
    assert (result.status, result.step, hook.best) == ("finished", 7, 0.5)


def test_a_gain_below_min_delta_is_none():
    result, hook = scripted("eval/score:min", 3, min_delta=1.0)
    assert (result.step, hook.best) == (4, 3.0)


def test_max_turns_the_comparison():
    result, hook = scripted("eval/score:max", 2)
    assert (result.step, hook.best, hook.best_step) == (3, 3.0, 1)


def test_a_second_run_with_the_same_hook_counts_from_zero():
    hook = EarlyStop("eval/score:min", 3)
    steps = [
        quiet(epochs=1, batch_size=8, eval_every=1, hooks=[hook]).run(Scripted(56)).step
        for _ in range(2)
    ]
    assert steps == [5, 5]


def test_counters_survive_a_resume(tmp_path):
    options = {"task": Scripted, "epochs": 1, "eval_every": 1}

    def make():
        return EarlyStop("eval/score:min", 3)

    whole = go(make, tmp_path / "whole", **options)
    go(make, tmp_path / "parts", stop_at=4, **options)
    rest = go(make, tmp_path / "parts", **options)
    assert [step for step, _ in rest["losses"]] == [5]
    assert rest["hook"] == whole["hook"]
    assert rest["status"] == whole["status"] == "stopped"


def test_a_run_that_was_stopped_stays_stopped_and_continues_with_more_patience(tmp_path):
    options = {"task": Scripted, "epochs": 1, "eval_every": 1}
    go(lambda: EarlyStop("eval/score:min", 3), tmp_path, **options)
    again = go(lambda: EarlyStop("eval/score:min", 3), tmp_path, **options)
    assert (again["losses"], again["status"]) == ([], "stopped")
    longer = go(lambda: EarlyStop("eval/score:min", 4), tmp_path, **options)
    assert [step for step, _ in longer["losses"]] == [6, 7, 8]


def test_an_unknown_metric_is_named_at_the_first_evaluation_with_the_known_ones():
    with pytest.raises(
        MetricError,
        match=r"no 'eval/los'. Did you mean 'eval/loss'\? It gave eval/loss, eval/runtime",
    ):
        quiet(steps=4, eval_every=2, hooks=[EarlyStop("eval/los:min")]).run(Tiny())


def test_a_run_that_never_evaluates_is_refused():
    with pytest.raises(OptionError, match="never evaluates"):
        quiet(steps=1, eval_every="never", hooks=[EarlyStop()]).run(Tiny())


def test_evaluating_alone_does_not_ask_for_the_metric():
    assert "eval/loss" in quiet(hooks=[EarlyStop("eval/other:min")]).evaluate(Tiny())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"metric": "eval/loss"}, "eval/loss:min"),
        ({"metric": ":min"}, "give the name of the metric"),
        ({"patience": 0}, "patience=0"),
        ({"patience": True}, "patience=True"),
        ({"min_delta": -1}, "min_delta=-1"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(OptionError, match=named):
        EarlyStop(**arguments)
