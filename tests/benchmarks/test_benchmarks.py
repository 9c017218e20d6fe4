"""The benchmarks run, compare like with like, and tell their contestants apart."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import (
    by_hand,
    checkpoint,
    counts,
    ours,
    overhead,
    page,
    prediction,
    record,
    start,
    turns,
)
from benchmarks.job import Job

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("full", [False, True])
def test_loopkit_and_both_hand_written_loops_do_the_same_job(full, monkeypatch):
    pytest.importorskip("tensorboardX")
    contestants = {overhead.BASE: by_hand.best, "loopkit": ours.loopkit}
    if not full:  # the usual loop draws its bar with tqdm, which only the peers bring
        contestants["usual"] = by_hand.naive
    found = overhead.measure(contestants, full, rounds=2)
    summary = overhead.summarise(found)
    assert summary.keys() == contestants.keys()
    assert all(len(blocks) == overhead.BLOCKS for rounds in found.values() for blocks in rounds)
    assert summary[overhead.BASE]["over"]["median"] == 0
    assert summary["loopkit"]["step"]["median"] > 10
    assert "loopkit" in overhead.table(summary)


def test_what_happens_between_two_calls_of_the_model_is_counted():
    def slow(job: Job) -> None:
        for batch in job.data:
            job.model(**batch)
            time.sleep(0.002)

    blocks, _ = overhead.once(slow, full=False)
    assert min(blocks) > 2000


def test_a_contestant_that_does_another_job_is_refused():
    def lazy(job: Job) -> None:
        for batch in job.data:
            job.model(**batch)

    with pytest.raises(RuntimeError, match="not the same job"):
        overhead.measure({overhead.BASE: by_hand.best, "lazy": lazy}, False, rounds=1)


def test_a_contestant_that_is_not_installed_is_left_out_with_a_line(capsys):
    def absent(job: Job) -> None:
        raise ImportError("No module named 'absent'")

    found = overhead.measure({overhead.BASE: by_hand.best, "absent": absent}, False, rounds=1)
    assert list(found) == [overhead.BASE]
    assert "left out: absent: ImportError" in capsys.readouterr().err


def test_every_way_to_save_gives_the_state_back(tmp_path):
    state = checkpoint.made(1, 3)
    for i, (save, load, _, _) in enumerate(checkpoint.CONTESTANTS.values()):
        folder = tmp_path / str(i)
        folder.mkdir()
        save(state, folder)
        loaded = load(folder)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["by hand", "loopkit"])
def test_hooks_and_parameters_are_counted(name):
    assert counts.step(name, 20, parameters=100) > 0
    assert counts.step(name, 20, hooks=3) > 0
    pytest.importorskip("torchmetrics")
    wanted: dict[int, dict[str, float]] = {}
    assert counts.batch("by hand", 3, 4, wanted) > 0
    assert counts.batch(name, 3, 4, wanted) > 0
    assert list(wanted[3]) == ["f0", "f1", "f2"]
    with pytest.raises(RuntimeError, match="gives"):
        counts.batch(name, 3, 4, {3: {"f0": 2.0}})


def test_the_first_step_is_timed_from_the_call_to_the_model():
    assert all(start.first_step(name, 100) > 0 for name in ("by hand", "loopkit"))
    assert start.resumed("loopkit", 2_000, 4_000) > 0


def test_predictions_are_compared(monkeypatch):
    own = {name: prediction.CONTESTANTS[name] for name in (prediction.BASE, "loopkit")}
    monkeypatch.setattr(prediction, "CONTESTANTS", own)
    rows = prediction.measure(2, 1_200)
    assert rows[prediction.BASE]["ratio"]["median"] == 1.0
    assert rows["loopkit"]["speed"]["low"] > 0
    monkeypatch.setitem(own, "loopkit", lambda model, data: torch.zeros(len(data)))
    with pytest.raises(RuntimeError, match="loopkit predicts other classes"):
        prediction.measure(1, 1_200)


def test_the_page_is_made_of_the_results():
    assert record.PAGE.read_text() == page.render(record.results())


def test_the_page_shows_what_was_measured():
    about = {
        "date": "2026-01-01",
        "versions": {"torch": "2"},
        "machine": {"cpu": "abacus", "cores": 1, "load": 0.0, "python": "3.12"},
    }
    row = {
        "step": {"median": 123.4, "low": 100, "high": 200},
        "over": {"median": 7},
        "ratio": {"median": 1.5},
    }
    text = page.render(
        {
            "overhead": {
                **about,
                "rounds": 3,
                "parameters": 9,
                "settings": {"bare": {"loopkit": row}},
            }
        }
    )
    assert "| loopkit | 123 | 100 to 200 | +7 | 1.50 |" in text
    assert "abacus" in text
    assert "import" not in text.split("## The cost of a step")[1]


def test_known_models_are_compared_on_a_device(monkeypatch):
    pytest.importorskip("transformers")
    from benchmarks.device import jobs, measures

    def lazy(job: jobs.DeviceJob) -> None:
        job.clocked(**job.batches[0])

    kept = {name: measures.CONTESTANTS[name] for name in ("by hand", "loopkit")}
    monkeypatch.setattr(measures, "CONTESTANTS", {**kept, "lazy": lazy})
    make = partial(jobs.gpt2, "cpu", 3, small=True, compile=False)
    found = measures.speeds(make, time.monotonic(), rounds=3)
    assert found["rounds"] == 1, "the time was over"
    assert list(found["rows"]) == ["by hand", "loopkit"], "lazy took another number of steps"
    assert found["flops"] > 0
    assert found["unit"] == "tokens"
    assert measures.save_stall(make, 1)["megabytes"] > 0.1
    assert measures.planned_memory(partial(jobs.gpt2, small=True), "cpu")["planned"] > 0.5
    row = {**found["rows"]["loopkit"], "mfu": 0.5}
    models = {
        "speeds": {"GPT-2": {**found, "rows": {"loopkit": row}}},
        "save": {"stall": 4.0, "megabytes": 1500.0},
        "copies": {"by hand": 1.1, "loopkit": 1.0},
        "plan": {"planned": 20000.0, "measured": 20100.0},
    }
    text = page._models(models)
    assert "| GPT-2, 1 runs | step, ms | ratio | tokens/s |" in text
    assert "1,500 MB in the background lengthens the run by 4 ms" in text


@pytest.mark.long
def test_each_line_of_the_gpu_command_runs_on_the_cpu():
    words = [
        sys.executable,
        "benchmarks/gpu.py",
        "--device=cpu",
        "--small",
        "--rounds=2",
        "--skip-tests",
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    for told in ("loopkit FSDP", "GPT-2 124M, 2 runs", "ResNet-50, 2 runs", "a save in", "planned"):
        assert told in done.stdout
    assert "left out: loopkit" not in done.stderr


def test_strategies_are_compared_in_turns_and_train_to_the_same_weights(rank_programs):
    words = [sys.executable, "benchmarks/strategies.py", "--rounds=2", "--block=1", "--kind=DDP"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = rank_programs.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.split("\nDDP\n")[1].splitlines()[1:]
    ratios = {row[:22].strip(): float(row.split()[-4]) for row in rows}
    assert ratios["by hand"] == 1.0
    assert ratios["loopkit"] > 0


def test_the_clock_of_a_contestant_stands_still_between_its_turns(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(turns, "perf_counter", lambda: now[0])
    monkeypatch.setattr(turns, "TURN", 0.5)

    def others_train() -> None:
        now[0] += 30.0

    clock, told = turns.TurnClock(others_train), []
    for _ in range(5):
        now[0] += 0.4
        told.append(clock() - 100.0)
    assert told == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert now[0] == pytest.approx(162.0)  # a turn ended at 0.8 and at 1.6
    clock = turns.TurnClock(others_train, calls=3)
    began = now[0]
    for _ in range(7):
        now[0] += 0.4
        told = clock()
    assert told - began == pytest.approx(7 * 0.4)
    assert now[0] - began == pytest.approx(7 * 0.4 + 60.0)  # a turn ended at the third and sixth


TURNS = {"slow": "4", "fast": "2"}


def test_contestants_take_turns_and_one_that_ends_is_named():
    code = """
import sys
name, turns = sys.argv[1], int(sys.argv[2])
for turn in range(turns):
    seed = sys.stdin.readline().strip()
    print("next" if turn < turns - 1 else f"{name} {seed}", flush=True)
"""
    with ExitStack() as ends:
        words = {name: [sys.executable, "-c", code, name, count] for name, count in TURNS.items()}
        runners = {name: ends.enter_context(turns.answering(it)) for name, it in words.items()}
        found = turns.in_turns(runners, ["fast", "slow"], 7)
        assert found == [("fast", "fast 7"), ("slow", "slow 7")]
        with pytest.raises(RuntimeError, match="fast ended with exit code 0"):
            turns.in_turns(runners, ["fast"], 8)
