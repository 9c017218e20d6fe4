"""eval_after leaves out the evaluations that fall due before it, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
from torch.utils.data import IterableDataset

from loopkit.durations import Cadence, Duration, RunLength, Start
from loopkit.errors import OptionError
from loopkit.optim import AdamW
from tests.support import Tiny, points, quiet


def evaluated(task: Tiny | None = None, **options: Any) -> list[int]:
    """The steps after which a run evaluates; 6 steps make an epoch."""
    steps: list[int] = []
    fit = quiet(**{"epochs": 3, "batch_size": 10, **options})
    fit.on("eval_start", lambda run: steps.append(run.progress.step))
    fit.run(task or Tiny())
    return steps


class Constant(Tiny):
    """Learns at one rate."""

    def optimizers(self) -> Any:
        return AdamW(lr=1e-2)


class Unsized(Constant):
    """Its training data does not say how long it is: 6 batches."""

    def train_data(self) -> Any:
        class Stream(IterableDataset):
            def __iter__(self):
                return iter([points(60)[i] for i in range(60)])

        return Stream()


@pytest.mark.parametrize(
    ("every", "after", "steps"),
    [
        ("4 steps", None, [4, 8, 12, 16, 18]),
        ("4 steps", "9 steps", [12, 16, 18]),
        ("4 steps", 8, [8, 12, 16, 18]),
        ("4 steps", "1 epoch", [8, 12, 16, 18]),
        ("4 steps", "50%", [12, 16, 18]),
        ("1 epoch", "2 epochs", [12, 18]),
        ("1 epoch", "1.5 epochs", [12, 18]),
        ("1 epoch", "12 steps", [12, 18]),
        ("1 epoch", "13 steps", [18]),
        ("25%", "40%", [9, 14, 18]),
        ("1 steps", "16 steps", [16, 17, 18]),
        ("4 steps", "1000 steps", [18]),
        ("4 steps", "1 h", [18]),
        ("never", "1 epoch", []),
    ],
)
def test_what_falls_due_before_it_is_left_out(every, after, steps):
    assert evaluated(eval_every=every, eval_after=after) == steps


def test_data_without_a_length_counts_its_epochs():
    assert evaluated(Unsized(), eval_every="1 epoch", eval_after="2 epochs") == [12, 18]
    assert evaluated(Unsized(), eval_every="4 steps", eval_after="9 steps") == [12, 16, 18]


def test_the_first_evaluation_and_one_asked_for_stay():
    class Asking(Tiny):
        def on_step_end(self, run, out):
            if run.progress.step == 3:
                run.request("eval")

    assert evaluated(Asking(), eval_every="4 steps", eval_after="12 steps", eval_first=True) == [
        0,
        3,
        12,
        16,
        18,
    ]


def test_by_the_clock_what_falls_due_before_is_not_put_off_until_then():
    clock = Cadence(Duration.parse("30 min", "eval_every"), RunLength(), "eval_every")
    clock.start = Start.parse("45 min", "eval_after", RunLength(), clock.every)
    minutes = [
        minute for minute in range(0, 121, 5) if clock.is_due(minute + 1, minute * 60.0, None)
    ]
    assert minutes == [60, 90, 120]
    steps = Cadence(Duration.parse("10 steps", "eval_every"), RunLength(), "eval_every")
    steps.start = Start.parse("45 min", "eval_after", RunLength(), steps.every)
    assert [step for step in range(1, 51) if steps.is_due(step, step * 120.0, None)] == [30, 40, 50]


def test_nothing_before_it_is_looked_at_again():
    cadence = Cadence(Duration.parse("4 steps", "eval_every"), RunLength(steps=100), "eval_every")
    cadence.start = Start.parse("50%", "eval_after", RunLength(steps=100), cadence.every)
    assert [cadence.next_step(step) for step in (0, 30, 51, 52, 97)] == [52, 52, 52, 56, 100]


def test_a_resumed_run_evaluates_where_the_whole_run_does(tmp_path):
    common = {
        "eval_every": "4 steps",
        "eval_after": "1 epoch",
        "run_dir": tmp_path,
        "checkpoint": True,
    }
    first = evaluated(Constant(), **common, steps=7)
    rest = evaluated(Constant(), **common, resume="auto")
    assert (first, rest) == ([7], [8, 12, 16, 18])  # the first part ends after step 7


def test_a_dry_run_evaluates_all_the_same():
    assert evaluated(dry_run=True, eval_after="1000 steps") == evaluated(dry_run=True) == [1, 2]


def test_the_best_checkpoint_is_chosen_among_those_from_then_on(tmp_path):
    from loopkit import Checkpoint

    class Worse(Tiny):
        """Best before it is trained at all."""

        def eval_step(self, batch):
            self.measured = getattr(self, "measured", 0) + 1
            return {"loss": super().eval_step(batch)["loss"] * 0 + self.measured}

    best = Checkpoint(best="eval/loss:min")
    options = {"batch_size": 10, "eval_batch_size": 20, "run_dir": tmp_path, "checkpoint": best}
    result = quiet(epochs=3, eval_after="2 epochs", **options).run(Worse())
    assert (result.best["step"], result.best["value"]) == (12, 1.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("later", "eval_after='later' is not a duration: give '500 steps'"),
        (
            "never",
            "eval_after='never' names no point of training: to switch evaluation off, give "
            "eval_every='never'",
        ),
        (0, "eval_after=0 is not a duration"),
    ],
)
def test_a_bad_value_is_named(value, text):
    with pytest.raises(OptionError, match=text):
        quiet(eval_after=value)


@pytest.mark.parametrize(
    ("after", "text"),
    [
        (
            "2 epochs",
            "eval_after='2 epochs' needs data with a length where the cadence is not in epochs",
        ),
        ("10%", "eval_after='10%' needs a run of known length"),
    ],
)
def test_a_point_that_cannot_be_found_is_refused(after, text):
    with pytest.raises(OptionError, match=text):
        quiet(epochs=2, batch_size=10, eval_every="4 steps", eval_after=after).run(Unsized())
