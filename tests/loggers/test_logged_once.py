from __future__ import annotations

import csv

import pytest
import torch
from dying_runs import Fails, Line
from event_files import scalars_of

from loopkit.fit.fit import Fit
from loopkit.loggers.jsonl import read_rows
from loopkit.options import Checkpoint


def attempt(run_dir, *hooks):
    torch.manual_seed(0)
    return Fit(
        batch_size=2,
        epochs=3,
        log_every=1,
        eval_every=5,
        run_dir=run_dir,
        resume="auto",
        progress=False,
        hooks=hooks,
        loggers=("jsonl", "csv", "tensorboard"),
        checkpoint=Checkpoint(every=4, background=False),
    ).run(Line())


def test_each_step_is_logged_once_by_every_logger_however_often_the_run_dies(tmp_path):
    for step in (3, 7, 17, 18):
        with pytest.raises(RuntimeError, match="went down"):
            attempt(tmp_path / "killed", Fails(step))
    result = attempt(tmp_path / "killed")
    attempt(tmp_path / "whole")
    rows = {name: read_rows(tmp_path / name / "metrics.jsonl") for name in ("killed", "whole")}
    for found in rows.values():
        assert [row["step"] for row in found if "train/loss" in row] == list(range(1, 31))
        assert [row["step"] for row in found if "eval/loss" in row] == [5, 10, 15, 20, 25, 30]
    losses = [
        [row["train/loss"] for row in found if "train/loss" in row] for found in rows.values()
    ]
    assert losses[0] == losses[1]
    assert all(row.pop("time") > 1.7e9 for row in rows["killed"])
    assert result.history == rows["killed"]
    with open(tmp_path / "killed" / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [int(row["step"]) for row in table if row["train/loss"]] == list(range(1, 31))
    points = scalars_of(tmp_path / "killed" / "tensorboard")["train/loss"]
    assert [step for step, _ in points] == list(range(1, 31))
    assert [value for _, value in points] == pytest.approx(losses[0])
