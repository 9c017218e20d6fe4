"""Runs over several ranks resume from every step, and on another number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from loopkit import Checkpoint
from tests.contract import coordination_jobs, jobs
from tests.contract.test_training import distance

SAVE = Checkpoint(every="1000 steps", background=False)
STRATEGIES = ["ddp", "fsdp"]
ZERO = ["zero1", "zero2", "zero3"]
OPTIONS = {
    "epochs": 2,
    "eval_every": "3 steps",
    "log_every": "3 steps",
    "clip_norm": 1.0,
    "loggers": "jsonl",
}


RUNS = {
    "kinds": {"batch_size": 8, "task_args": {"kind": "dataset"}},
    "words": {"batch_size": 4, "accumulate": 2},
}
EVERY = range(1, 8)
# Of 8 steps, with 7 of them to an epoch. What restores a step is the same code in all strategies.
CASES = [("ddp", "kinds", EVERY), ("ddp", "words", EVERY)]
CASES += [("fsdp", "kinds", (3,)), ("fsdp", "words", (3, 6, 7))]
CASES += [("zero1", "words", (6,)), ("zero2", "words", (7,)), ("zero3", "words", (3, 7))]
CASES += [
    pytest.param(strategy, task, EVERY, marks=pytest.mark.long)
    for strategy in ("fsdp", *ZERO)
    for task in RUNS
]


@pytest.mark.parametrize(("strategy", "task", "stops"), CASES)
def test_resume_from_every_step_is_identical(pair, tmp_path, strategy, task, stops):
    options = {"task": task, **OPTIONS, **RUNS[task]}
    assert pair.call(jobs.resume_everywhere, strategy, tmp_path, stops, **options) == [[], []]


@pytest.mark.parametrize(
    ("kind", "rng"),
    [
        ("list", "counter"),
        ("stream", "counter"),
        ("sharded", "counter"),
        ("stateful", "counter"),
        ("objects", "counter"),
        ("combined", "counter"),
        ("dataset", "stream"),
    ],
)
def test_resume_is_identical_on_every_kind_of_data(pair, tmp_path, kind, rng):
    options = {**OPTIONS, "batch_size": 8, "steps": 8, "task_args": {"kind": kind}, "rng": rng}
    assert pair.call(
        jobs.resume_everywhere,
        "ddp",
        tmp_path,
        (1, 4, 7),
        task="kinds",
        **options,
    ) == [[], []]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("task", ["kinds", "words"])
def test_a_run_resumes_over_another_number_of_ranks(pair, tmp_path, strategy, task):
    # Without clipping, whose norm FSDP rounds in its own way, all strategies give the same bits.
    options = {
        **OPTIONS,
        "batch_size": 4,
        "global_batch_size": 8,
        "resume": "auto",
        "checkpoint": SAVE,
        "clip_norm": None,
    }
    whole = jobs.train("single", task, run_dir=tmp_path / "whole", **options)
    for stop in (1, 5, 9) if strategy == "ddp" else (5,):
        # From one rank to two.
        first = jobs.train("single", task, run_dir=tmp_path / f"up-{stop}", stop_at=stop, **options)
        rest, other = pair.call(
            jobs.train, strategy, task, run_dir=tmp_path / f"up-{stop}", **options
        )
        assert (first["step"], rest["progress"]) == (stop, whole["progress"])
        assert rest["digest"] == other["digest"]
        assert (rest["digest"], rest["rows"]) == (whole["digest"], whole["rows"])
        # And from two to one.
        pair.call(
            jobs.train, strategy, task, run_dir=tmp_path / f"down-{stop}", stop_at=stop, **options
        )
        rest = jobs.train("single", task, run_dir=tmp_path / f"down-{stop}", **options)
        assert (rest["digest"], rest["rows"]) == (whole["digest"], whole["rows"])


@pytest.mark.parametrize("kind", ["dataset", "list", "stateful", "combined"])
def test_passes_stay_passes_over_another_number_of_ranks(pair, tmp_path, kind):
    options = {"epochs": 2, "eval_every": "never", "checkpoint": SAVE, "resume": "auto"}
    options |= {"batch_size": 4, "task": "kinds", "task_args": {"kind": kind, "count": 44}}

    def train(ranks: int, name: str, **how: Any) -> Any:
        how = {**options, **how, "run_dir": tmp_path / name}
        if ranks == 1:
            return jobs.train("single", **how)["progress"]
        return pair.call(jobs.train, "ddp", **how)[0]["progress"]

    whole = train(1, "whole")
    for before, after in ((1, 2), (2, 1)):
        for stop in (2, 4):
            train(before, f"{before}-{stop}", stop_at=stop)
            rest = train(after, f"{before}-{stop}")
            assert (rest["epoch"], rest["samples"]) == (2, whole["samples"])
    train(1, "smaller", stop_at=2)
    if kind == "dataset":
        rest = train(2, "smaller", batch_size=3)
        assert (rest["epoch"], rest["samples"]) == (2, whole["samples"])


def test_a_save_in_the_background_is_reported_on_all_ranks(pair, tmp_path):
    first, second = pair.call(coordination_jobs.saves, tmp_path)
    assert first == second
    assert first[-1] == ("fit_end", 8)
    assert [what for what in first if what[0] == "save"] == [
        ("save", step) for step in (2, 4, 6, 8)
    ]


def test_a_rank_that_sees_another_directory_is_named(pair, tmp_path):
    for told in pair.call(coordination_jobs.other_directories, tmp_path):
        assert "cannot be read by rank 1" in told
        assert "All ranks must see one run directory" in told


def test_a_full_disk_ends_all_ranks_alike_and_loses_nothing(pair, tmp_path):
    first, second = pair.call(coordination_jobs.disk_full, tmp_path)
    assert first == second
    assert "DiskFullError" in first


@pytest.mark.parametrize(("before", "after"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_run_resumes_under_another_strategy(pair, tmp_path, before, after):
    options = {**OPTIONS, "batch_size": 4, "resume": "auto", "checkpoint": SAVE, "clip_norm": None}
    whole = pair.call(jobs.train, before, "words", run_dir=tmp_path / "whole", **options)[0]
    pair.call(jobs.train, before, "words", run_dir=tmp_path / "run", stop_at=5, **options)
    rest = pair.call(jobs.train, after, "words", run_dir=tmp_path / "run", **options)[0]
    assert (rest["digest"], rest["rows"], rest["progress"]) == (
        whole["digest"],
        whole["rows"],
        whole["progress"],
    )


@pytest.mark.parametrize(
    ("strategy", "other", "size"),
    [
        ("zero1", "same", 1),
        ("zero1", "ddp", 2),
        ("zero2", "single", 1),
        ("zero2", "zero1", 2),
        ("zero3", "same", 1),
        ("zero3", "ddp", 2),
        ("zero3", "zero1", 2),
    ],
)
def test_a_deepspeed_run_resumes_elsewhere_from_the_state_it_had(
    pool, tmp_path, strategy, other, size
):
    options = {
        **OPTIONS,
        "batch_size": 4,
        "global_batch_size": 8,
        "checkpoint": SAVE,
        "resume": "auto",
    }
    whole = jobs.train("single", "words", run_dir=tmp_path / "whole", **options)
    places = [(strategy, 2), (strategy if other == "same" else other, size)]
    for before, after in (places, places[::-1]):
        run = {**options, "run_dir": tmp_path / f"from-{before[0]}-{before[1]}"}
        saved = pool(before[1]).call(jobs.train, before[0], "words", stop_at=5, **run)[0]
        rest = pool(after[1]).call(jobs.train, after[0], "words", **run)[0]
        assert distance(rest["loaded"]["model"], saved["model"]) == 0
        assert distance(rest["loaded"]["optimizer"], saved["optimizer"]) == 0
        assert rest["loaded"]["plain"] == saved["plain"]
        assert rest["progress"] == whole["progress"]
        assert distance(rest["model"], whole["model"]) < 1e-6
        assert rest["rows"][-1] == pytest.approx(
            whole["rows"][-1], rel=1e-5
        )  # so the samples were the same


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_metrics_over_the_epoch_are_those_of_one_process_and_come_back(pool, tmp_path, strategy):
    options = {"batch_size": 4, "eval_every": "2 steps"}
    alone = jobs.kept("single", str(tmp_path / "alone"), batch_size=8, eval_every="2 steps")
    assert [values[2] for values in alone] == [37, 37, 37]
    pair = pool(2)

    def called(folder, size=2, stop=None):
        found = pool(size).call(jobs.kept, strategy, str(tmp_path / folder), stop, **options)
        assert all(part == found[0] for part in found)
        return found[0]

    whole = pair.call(jobs.kept, strategy, str(tmp_path / "whole"), **options)[0]
    for values, expected in zip(whole, alone, strict=True):
        assert values == pytest.approx(expected, abs=1e-6)
    for stop in (3, 7) if strategy == "ddp" else (7,):
        parts = called(str(stop), stop=stop) + called(str(stop))
        assert parts == whole


def test_a_rank_whose_data_has_ended_adds_nothing_to_a_metric(pair):
    assert pair.call(jobs.kept_uneven, "ddp") == [[37 + 54] * 3] * 2


def test_metrics_over_the_epoch_continue_on_another_number_of_ranks(pool, tmp_path):
    alone = jobs.kept("single", str(tmp_path / "alone"), batch_size=4, accumulate=2)
    folder, options = str(tmp_path / "parts"), {"batch_size": 4}
    first = pool(2).call(jobs.kept, "ddp", folder, 7, **options)[0]
    rest = jobs.kept("single", folder, batch_size=4, accumulate=2)
    for values, expected in zip(first + rest, alone, strict=True):
        assert values == pytest.approx(expected, abs=1e-6)
