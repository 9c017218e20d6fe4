from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch
from made_runs import Clock, evaluate, made_run, take_step

from loopkit.console import build_progress
from loopkit.console.epoch_table import EpochTable
from loopkit.console.plain_progress import PlainProgress
from loopkit.durations import RunLength
from loopkit.errors import OptionError


def shown(clock: Clock, **fields: object) -> tuple[object, io.StringIO]:
    file = io.StringIO()
    run = made_run(PlainProgress(file=file, clock=clock), **fields)
    return run, file


def test_a_run_reads_as_a_log(tmp_path):
    clock = Clock()
    run, file = shown(clock, metrics={"train/loss": 0.75, "lr": 3e-4})
    run.events.fit_start(run)
    for _ in range(200):
        take_step(run, clock, 0.0625)
        if run.progress.step_in_epoch == 0:
            evaluate(run, clock, loss=0.5, accuracy=0.9)
    run.record.best = {"metric": "eval/accuracy", "value": 0.9, "step": 100}
    run.events.fit_end(run)
    assert (
        file.getvalue()
        == """\
Digits: 9,610 parameters, all trainable, 0.04 MB
  on       cpu, fp32, SingleDevice
  for      4 epochs, 400 steps
  in       runs/digits/3
     Epoch        Step  Training Loss  Validation Loss    Accuracy     Runtime   Samples/s
------------------------------------------------------------------------------------------
         1         100         0.7500           0.5000      0.9000      0.40 s     2,500.0
         2         200         0.7500           0.5000      0.9000      0.40 s     2,500.0
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
    assert len(table.lines(run, {"eval/loss": 1.0})) == 3
    assert len(table.lines(run, {"eval/loss": 2.0})) == 1
    header, _, row = table.lines(run, {"eval/loss": 2.0, "eval/val_a/mIoU": 0.5})
    assert header.split() == [
        "Epoch",
        "Step",
        "Training",
        "Loss",
        "Validation",
        "Loss",
        "val_a/mIoU",
    ]
    assert len(header) == len(row)


def test_the_table_keeps_to_six_metrics_and_to_the_width_of_the_screen():
    metrics = {
        "eval/loss": 1.0,
        **{f"eval/metric_{n}": n / 10 for n in range(20)},
        "eval/runtime": 123.0,
    }
    wide = EpochTable().lines(made_run(), metrics)
    assert wide[0].count("Metric") == 6
    assert wide[2].split()[-1] == "2:03"
    narrow = EpochTable(100).lines(made_run(), metrics)
    assert narrow[0].count("Metric") == 2
    assert max(map(len, narrow)) <= 100


def test_an_epoch_in_part_is_a_fraction_and_a_loss_not_logged_yet_a_dash():
    run = made_run(length=RunLength(100, 400, 4))
    run.progress.step = run.progress.step_in_epoch = 25
    assert EpochTable().lines(run, {"eval/loss": 1.0})[2].split() == ["0.25", "25", "-", "1.0000"]


@pytest.mark.parametrize(
    ("option", "says"), [("rch", "Did you mean 'rich'"), (3, "auto, rich, plain or False")]
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
