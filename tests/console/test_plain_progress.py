from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
import torch
from made_runs import Clock, evaluate, made_run, take_step

from loopkit import Checkpoint
from loopkit.console import build_progress
from loopkit.console.epoch_table import EpochTable
from loopkit.console.plain_progress import PlainProgress
from loopkit.durations import RunLength
from loopkit.errors import OptionError
from loopkit.options import Options


def shown(clock: Clock, **fields: object) -> tuple[object, io.StringIO]:
    file = io.StringIO()
    run = made_run(PlainProgress(file=file, clock=clock), **fields)
    return run, file


def test_a_run_reads_as_a_log(tmp_path):
    clock = Clock()
    run, file = shown(clock, metrics={"train/loss": 0.75, "lr": 3e-4})
    run.events.fit_start(run)
    for loss, accuracy in ((0.5, 0.9), (0.6, 0.91)):
        for _ in range(100):
            take_step(run, clock, 0.0625)
        run.record.since_eval = {"train/loss": loss + 0.1}
        evaluate(run, clock, loss=loss, accuracy=accuracy)
    run.record.best = {"metric": "eval/accuracy", "value": 0.9, "step": 100}
    run.events.fit_end(run)
    assert (
        file.getvalue()
        == """\
Digits: 9,610 parameters, all trainable, 38.4 kB
  on       cpu, fp32, SingleDevice
  for      4 epochs, 400 steps
  in       runs/digits/3
(* is the best validation loss so far)
Epoch    Step  Training Loss  Validation Loss   Accuracy    Runtime  Samples/s
------------------------------------------------------------------------------
    1     100         0.6000           0.5000     0.9000     0.40 s      2,500 *
    2     200         0.7000           0.6000     0.9100     0.40 s      2,500
step 200/400 (50%) | epoch 3/4 | loss 0.7500 | lr 3.00e-04 | 16.0 it/s | 0:12 elapsed | 0:12 left
Finished: 200 steps in 0:12, best eval/accuracy 0.9000 at step 100
"""
    )


def test_lines_come_at_most_every_ten_seconds_and_cost_one_look_at_the_clock_in_between():
    clock = Clock()
    run, file = shown(clock)
    run.events.fit_start(run)
    opening = file.getvalue()
    before = clock.reads
    for _ in range(79):
        take_step(run, clock, 0.125)
    assert clock.reads - before == 79
    assert file.getvalue() == opening
    for _ in range(161):
        take_step(run, clock, 0.125)
    lines = file.getvalue().removeprefix(opening).splitlines()
    assert [line.split(" | ")[0] for line in lines] == [
        "step 80/400 (20%)",
        "step 160/400 (40%)",
        "step 240/400 (60%)",
    ]


def test_long_evaluations_say_where_they_are():
    clock = Clock()
    run, file = shown(clock)
    run.events.fit_start(run)
    run.events.eval_start(run)
    for _ in range(5):
        clock.now += 6.0
        run.events.eval_step_end(run, {})
    assert file.getvalue().splitlines()[-2:] == ["evaluating: 2 batches", "evaluating: 4 batches"]


def test_the_checkpoint_that_a_run_resumes_from_is_printed(tmp_path):
    run, file = shown(Clock(), resumed_from=tmp_path / "step-7")
    run.progress.step = 7
    run.events.fit_start(run)
    assert file.getvalue().splitlines()[-1] == f"  resumed  {tmp_path / 'step-7'}, at step 7"


def test_other_ranks_are_silent():
    clock = Clock()
    run, file = shown(clock, rank=1)
    run.events.fit_start(run)
    for _ in range(300):
        take_step(run, clock, 1.0)
    evaluate(run, clock, loss=1.0)
    run.events.error(run, ValueError("x"))
    run.events.fit_end(run)
    assert file.getvalue() == ""


def test_no_tensor_is_read(monkeypatch):
    for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_: pytest.fail("a tensor was read"))
    clock = Clock()
    run, _ = shown(clock)
    run.events.fit_start(run)
    for _ in range(50):
        take_step(run, clock, 1.0)
    evaluate(run, clock, loss=1.0)
    run.events.fit_end(run)


def test_a_pipe_nobody_reads_any_more_stops_the_printing_and_nothing_else():
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError("gone")

    clock = Clock()
    run = made_run(PlainProgress(file=Gone(), clock=clock))
    run.events.fit_start(run)
    take_step(run, clock, 100.0)
    evaluate(run, clock, loss=1.0)
    run.events.fit_end(run)


def test_the_header_comes_again_when_the_columns_change():
    table, run = EpochTable(), made_run()
    assert len(table.lines(run, {"eval/loss": 1.0})) == 4  # with what the star means
    assert len(table.lines(run, {"eval/loss": 2.0})) == 1
    header, _, row = table.lines(run, {"eval/loss": 2.0, "eval/val_a/mIoU": 0.5})
    assert re.split("  +", header.strip()) == ["Epoch", "Step", "Training Loss", "Validation Loss", "val_a/mIoU"]  # fmt: skip
    assert len(header) == len(row)


@pytest.mark.parametrize(
    ("cells", "shown", "more", "speed"),
    [
        (None, 6, "+14 more", 1),
        (200, 6, "+14 more", 1),
        (100, 3, "+17 more", 0),
        (80, 2, "+18 more", 0),
        (60, 0, "+20 more", 0),
    ],
)
def test_metrics_go_before_the_speed_and_those_that_do_not_fit_are_counted(
    cells, shown, more, speed
):
    metrics = {f"eval/metric_{n}": n / 10 for n in range(20)}
    run = made_run(since_eval={"train/loss": 0.5})
    lines = EpochTable(cells).lines(
        run, {"eval/loss": 1.0, **metrics, "eval/runtime": 123.0, "eval/samples_per_second": 10.0}
    )
    assert lines[1].count("Metric") == shown
    assert more in lines[1]
    assert lines[1].count("Samples/s") == speed
    assert max(map(len, lines)) <= (cells or 1000)


def test_the_best_row_is_that_of_the_monitor_of_the_run_and_of_earlier_attempts():
    run = made_run(history=[{"step": 1, "eval/f1": 0.5}, {"step": 1, "train/loss": 0.1}])
    run.options, run.progress.step = Options(checkpoint=Checkpoint(best="eval/f1:max")), 2
    table = EpochTable()
    marks = [table.lines(run, {"eval/f1": f1})[-1].endswith(" *") for f1 in (0.4, 0.6, 0.5, 0.7)]
    assert marks == [False, True, False, True]
    assert not table.lines(run, {"eval/f1": float("nan")})[-1].endswith("*")


def test_an_epoch_in_part_is_a_fraction_and_a_loss_not_logged_yet_a_dash():
    run = made_run(length=RunLength(100, 400, 4))
    run.progress.step = run.progress.step_in_epoch = 25
    row = EpochTable().lines(run, {"eval/loss": 1.0})[3]
    assert row.split() == ["0.25", "25", "-", "1.0000", "*"]


@pytest.mark.parametrize(
    ("option", "says"), [("rch", "Did you mean 'rich'"), (3, "auto, rich, html, plain or False")]
)
def test_an_unknown_kind_of_progress_is_refused(option, says):
    with pytest.raises(OptionError, match=says):
        build_progress(option)


@pytest.mark.parametrize("option", [False, None])
def test_no_progress_is_no_hook(option):
    assert build_progress(option) is None


def test_auto_is_plain_where_stderr_is_no_terminal():
    code = (
        "from loopkit.console import build_progress; print(type(build_progress('auto')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "PlainProgress"
