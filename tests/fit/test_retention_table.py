"""Which checkpoints are left: cadence x best metric x what is kept, against listings worked out by
hand.

Twelve steps, six of them an epoch; evaluated at every second step. A checkpoint is made when one is
due, at every new best and at the last step; it has a metric where that step was evaluated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loopkit import Checkpoint
from loopkit.checkpoint.tools import verify_tree
from tests.support import Tiny, quiet

#         new best for "min": 2, 4, 8; for "max": 2, 12
VALUES = {2: 5.0, 4: 3.0, 6: 4.0, 8: 1.0, 10: 2.0, 12: 6.0}
POLICIES = ({"keep": 1}, {"keep": 2}, {"keep": 2, "keep_best": 2}, {"keep": None})
ALL = list(range(1, 13))
TABLE = {
    # every, best: what is left with keep=1      keep=2          keep=2, keep_best=2   keep=None
    ("1 steps", None): ([12], [11, 12], [11, 12], ALL),
    ("1 steps", "min"): ([8, 12], [8, 11, 12], [8, 10, 11, 12], ALL),
    ("1 steps", "max"): ([12], [11, 12], [2, 11, 12], ALL),
    ("3 steps", None): ([12], [9, 12], [9, 12], [3, 6, 9, 12]),
    ("3 steps", "min"): ([8, 12], [8, 9, 12], [4, 8, 9, 12], [2, 3, 4, 6, 8, 9, 12]),
    ("3 steps", "max"): ([12], [9, 12], [2, 9, 12], [2, 3, 6, 9, 12]),
    ("5 steps", None): ([12], [10, 12], [10, 12], [5, 10, 12]),
    ("5 steps", "min"): ([8, 12], [8, 10, 12], [8, 10, 12], [2, 4, 5, 8, 10, 12]),
    ("5 steps", "max"): ([12], [10, 12], [2, 10, 12], [2, 5, 10, 12]),
    ("1 epoch", None): ([12], [6, 12], [6, 12], [6, 12]),
    ("1 epoch", "min"): ([8, 12], [8, 12], [4, 8, 12], [2, 4, 6, 8, 12]),
    ("1 epoch", "max"): ([12], [6, 12], [2, 6, 12], [2, 6, 12]),
    ("75%", None): ([12], [9, 12], [9, 12], [9, 12]),
    ("75%", "min"): ([8, 12], [8, 9, 12], [4, 8, 9, 12], [2, 4, 8, 9, 12]),
    ("75%", "max"): ([12], [9, 12], [2, 9, 12], [2, 9, 12]),
    ("never", None): ([12], [12], [12], [12]),
    ("never", "min"): ([8, 12], [8, 12], [4, 8, 12], [2, 4, 8, 12]),
    ("never", "max"): ([12], [2, 12], [2, 12], [2, 12]),
}
ROWS = [
    pytest.param(
        every,
        best,
        policy,
        left,
        id=f"{every}-{best}-{'-'.join(f'{k}={v}' for k, v in policy.items())}",
    )
    for (every, best), lists in TABLE.items()
    for policy, left in zip(POLICIES, lists, strict=True)
]


class Rigged(Tiny):
    """Its metric is a given value at each step."""

    values = VALUES

    def on_fit_start(self, run: Any) -> None:
        self.step = run.progress.step

    def on_step_end(self, run: Any, out: Any) -> None:
        self.step = run.progress.step

    def eval_step(self, batch: Any) -> dict[str, Any]:
        return {"loss": super().eval_step(batch)["loss"] * 0 + self.values[self.step]}


def left(run_dir: Path) -> list[int]:
    """The steps of the checkpoints; nothing else lies among them, and every byte is good."""
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    steps = [int(name.removeprefix("step-")) for name in names if name != "latest"]
    assert names == ["latest", *(f"step-{step:012}" for step in steps)]
    assert not any(verify_tree(run_dir).values())
    return steps


def run(
    run_dir: Path,
    every: str,
    best: str | None,
    policy: dict[str, Any],
    task: Tiny | None = None,
    stop: int = 0,
    **more: Any,
) -> Any:
    settings = Checkpoint(every=every, best=best and f"eval/loss:{best}", **policy, **more)
    fit = quiet(
        epochs=2, batch_size=10, eval_every=2, run_dir=run_dir, checkpoint=settings, resume="auto"
    )
    fit.on(
        "step_end", lambda run, out: run.stop("for the test") if run.progress.step == stop else None
    )
    return fit.run(task or Rigged())


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize(("every", "best", "policy", "expected"), ROWS)
def test_what_is_left_is_what_the_table_says(tmp_path, every, best, policy, expected, background):
    result = run(tmp_path, every, best, policy, background=background)
    assert left(tmp_path) == expected
    assert result.checkpoint.name == f"step-{12:012}"
    if best is not None:
        step = {"min": 8, "max": 12}[best]
        assert (result.best["step"], result.best["value"]) == (step, VALUES[step])
        assert result.best["checkpoint"].name == f"step-{step:012}"
        manifest = json.loads((result.best["checkpoint"] / "MANIFEST.json").read_text())
        assert manifest["metrics"]["eval/loss"] == VALUES[step]


@pytest.mark.parametrize(
    ("every", "best", "policy", "expected"), [row for row in ROWS if row.values[2] == {"keep": 1}]
)
def test_a_run_that_is_stopped_and_resumed_leaves_the_same(tmp_path, every, best, policy, expected):
    run(tmp_path, every, best, policy, stop=7)
    assert 7 in left(tmp_path)
    run(tmp_path, every, best, policy)
    assert left(tmp_path) == expected


@pytest.mark.parametrize("mode", ["min", "max"])
def test_of_equal_ones_the_first_is_the_best(tmp_path, mode):
    class Level(Rigged):
        values = dict.fromkeys(VALUES, 1.0)

    result = run(tmp_path, "3 steps", mode, {"keep": 1}, Level())
    assert left(tmp_path) == [2, 12]
    assert result.best["step"] == 2


@pytest.mark.parametrize(("every", "expected"), [("3 steps", [8, 9, 12]), ("never", [8, 12])])
def test_weights_alone_are_kept_by_the_same_rule(tmp_path, every, expected):
    settings = Checkpoint(every=every, best="eval/loss:min", keep=2, weights_only=True)
    quiet(epochs=2, batch_size=10, eval_every=2, run_dir=tmp_path, checkpoint=settings).run(
        Rigged()
    )
    assert left(tmp_path) == expected
