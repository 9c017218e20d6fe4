"""Values logged in events at the end of an epoch, an evaluation or the run are rows of that step."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loopkit import Hook
from tests.support import Tiny, quiet


class Logs(Hook):
    def on_epoch_end(self, run: Any) -> None:
        run.log({"epoch_value": float(run.progress.epoch)})

    def on_eval_end(self, run: Any, metrics: Any) -> None:
        run.log({"best_so_far": -metrics["eval/loss"]})
        run.log({"best_so_far": -metrics["eval/loss"]})

    def on_fit_end(self, run: Any) -> None:
        run.log({"at_the_end": 1.0})


class TaskLogs(Tiny):
    def on_epoch_end(self, run: Any) -> None:
        self.log("epoch_value", float(run.progress.epoch))

    def on_eval_end(self, run: Any, metrics: Any) -> None:
        self.log("best_so_far", -metrics["eval/loss"], reduce="max")

    def on_fit_end(self, run: Any) -> None:
        self.log("at_the_end", 1.0)


@pytest.mark.parametrize("kind", ["hook", "task"])
@pytest.mark.parametrize("log_every", ["5 steps", "never", "1 epoch"])
def test_each_is_a_row_of_its_step_the_last_epochs_too(kind, log_every, tmp_path):
    task, hooks = (Tiny(), [Logs()]) if kind == "hook" else (TaskLogs(), [])
    result = quiet(
        epochs=3, batch_size=8, log_every=log_every, hooks=hooks, loggers="jsonl", run_dir=tmp_path
    ).run(task)
    per_epoch = result.step // 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for found in (rows, result.history):
        values = {row["step"]: row["epoch_value"] for row in found if "epoch_value" in row}
        assert values == {per_epoch * n: float(n) for n in (1, 2, 3)}
        assert [row["step"] for row in found if "best_so_far" in row] == list(values)
        assert [row["step"] for row in found if "at_the_end" in row] == [result.step]
    losses = {row["step"]: row["eval/loss"] for row in rows if "eval/loss" in row}
    assert all(row["best_so_far"] == -losses[row["step"]] for row in rows if "best_so_far" in row)
    assert result.metrics["epoch_value"] == 3.0
    assert result.metrics["at_the_end"] == 1.0


def test_training_means_do_not_change_by_what_events_log():
    plain = quiet(epochs=2, batch_size=8, log_every=4).run(Tiny())
    logged = quiet(epochs=2, batch_size=8, log_every=4, hooks=[Logs()]).run(Tiny())
    for with_step in (4, 8):
        rows = [
            [row["train/loss"] for row in r.history if row["step"] == with_step and "lr" in row]
            for r in (plain, logged)
        ]
        assert rows[0] == rows[1]


def test_evaluate_returns_what_on_eval_end_logs():
    metrics = quiet(hooks=[Logs()]).evaluate(Tiny())
    assert metrics["best_so_far"] == -metrics["eval/loss"]
