"""Power loss at any moment: what was not synced may be there, gone, torn or zeros, in any
combination.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

from snapshots import alike, make

from loopkit import Checkpoint
from loopkit.checkpoint import (
    Store,
    apply_retention,
    clean,
    detach_after,
    load_newest,
    load_snapshot,
    scan,
    verify_checkpoint,
    write_checkpoint,
)
from loopkit.errors import CheckpointError
from loopkit.loggers.jsonl import read_rows
from loopkit.testing.disk import Disk, Operation
from loopkit.testing.forks import MEMORY, on_forked_ranks
from loopkit.testing.power_loss import Promises, check_what_is_left, crashes
from loopkit.testing.recording import read_log, recording
from tests.support import Tiny, quiet


class Logging(Store):
    def __init__(self) -> None:
        self.log: list[Operation] = []

    def _op(self, kind: str, path: Path, extra: Any = None) -> None:
        self.log.append((kind, path, bytes(extra) if kind == "write" else extra))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The log of three saves with retention, and after which operation which step is promised."""
    run_dir, store, promised = tmp_path_factory.mktemp("story"), Logging(), {0: 0}
    for step in (1, 2, 3):
        write_checkpoint(store, run_dir, make(step))
        promised[len(store.log)] = step
        apply_retention(store, run_dir, keep=1)
    assert sorted(p.name for p in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step-000000000003",
    ]
    return run_dir, store.log, promised


def states(story, samples: int, seed: int, ignore: tuple[str, ...] = ()) -> int:
    """Check every prefix of the log in ``samples`` states of the disk; how many states that were."""
    run_dir, log, promised = story
    disk, made, count, promise = Disk(run_dir, ignore), random.Random(seed), 0, 0
    for number in range(len(log) + 1):
        promise = promised.get(number, promise)
        for _ in range(samples):
            with tempfile.TemporaryDirectory(dir=MEMORY) as name:
                after, told = Path(name), []
                disk.crash(made, after)
                clean(Store(), after)
                found = load_newest(Store(), after, warn=told.append)
                step = found[1].meta["step"] if found else 0
                assert step >= promise, (
                    f"operation {number}: step {promise} was promised, {step} is there"
                )
                assert found is None or alike(found[1], make(step)), (
                    f"operation {number}: another content"
                )
                assert told == [], f"operation {number}: {told}"
                bad = [entry.problem for entry in scan(Store(), after, deep=True) if entry.problem]
                assert bad == [], f"operation {number}: {bad}"
                count += 1
        if number < len(log):
            disk.do(log[number])
    return count


def test_every_moment_leaves_some_complete_checkpoint(story):
    assert states(story, samples=1, seed=0) >= 200


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 11))
def test_twenty_thousand_states_in_ten_parts(story, seed):
    assert states(story, samples=10, seed=seed) >= 2000


@pytest.mark.parametrize("ignored", ["sync", "sync_dir"])
def test_the_model_of_the_disk_does_find_what_is_not_synced(story, ignored):
    with pytest.raises((AssertionError, CheckpointError)):
        states(story, samples=10, seed=0, ignore=(ignored,))


def test_each_sync_in_the_log_is_one_that_the_system_was_asked_for(tmp_path, monkeypatch):
    asked, fsync, store = [], os.fsync, Logging()
    monkeypatch.setattr(
        os,
        "fsync",
        lambda handle: (asked.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)),
    )
    write_checkpoint(store, tmp_path, make(1))
    assert asked == [str(path) for kind, path, _ in store.log if kind in ("sync", "sync_dir")]
    assert len(asked) > 10


def recorded(place: Path, ranks: int = 1, **options: Any) -> tuple[Path, Path, list[Operation]]:
    """The operations of a run that stops at step 10 and continues, its parent directories included."""
    root, log, run_dir = place / "root", place / "log", Path("runs", "tiny")
    root.mkdir()

    def run_twice() -> None:
        with recording(root, log) as recorder:
            for stop in (10, None):
                fit = quiet(
                    **{
                        "epochs": 2,
                        "batch_size": 8 // ranks,
                        "eval_every": "5 steps",
                        "log_every": "3 steps",
                        "loggers": ("jsonl", "csv", "tensorboard"),
                        "run_dir": root / run_dir,
                        "resume": "auto",
                        "checkpoint": Checkpoint(every="4 steps", keep=2),
                        "hooks": [Promises(recorder)],
                        **options,
                    }
                )
                if stop is not None:
                    fit.on("step_end", lambda run, out: run.progress.step == 10 and run.stop(""))
                fit.run(Tiny())

    if ranks == 1:
        run_twice()
    else:
        assert [(each.code, each.error) for each in on_forked_ranks(ranks, run_twice, 240.0)] == [
            (0, "")
        ] * 2
    return root, run_dir, read_log(log)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return recorded(tmp_path_factory.mktemp("runs").resolve())


def lines(path: Path) -> list[list[str]]:
    return [line.split(",") for line in path.read_text().splitlines()] if path.exists() else []


def after_a_power_loss(runs, count: int, seed: int, ignore: tuple[str, ...] = ()) -> None:
    """Check the run directory in each state: the newest save that was promised, and its rows."""
    root, run_dir, operations = runs
    rows = read_rows(root / run_dir / "metrics.jsonl")
    table = lines(root / run_dir / "metrics.csv")
    for crashed in crashes(operations, root, count, seed, ignore=ignore):
        step = check_what_is_left(crashed, run_dir, rows, lambda snapshot: None)
        if step:
            steps = [cells[0] for cells in lines(crashed.path / run_dir / "metrics.csv")[1:]]
            known = [cells[0] for cells in table[1:] if int(cells[0]) <= step]
            assert steps[: len(known)] == known, crashed.number


def test_a_promised_save_and_its_rows_survive_in_a_directory_that_survives(runs):
    after_a_power_loss(runs, count=300, seed=0)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(1, 6))
def test_thousands_of_states_of_a_run(runs, seed):
    after_a_power_loss(runs, count=2000, seed=seed)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("background", [True, False])
def test_thousands_of_states_of_a_run_over_two_ranks(tmp_path, strategy, background):
    save = Checkpoint(every="4 steps", keep=2, background=background)
    ranks = recorded(tmp_path.resolve(), ranks=2, strategy=strategy, checkpoint=save)
    after_a_power_loss(ranks, count=2000, seed=0)


@pytest.mark.parametrize("ignored", ["sync", "sync_dir"])
def test_the_model_does_find_what_a_run_does_not_sync(runs, ignored):
    with pytest.raises((AssertionError, CheckpointError)):
        after_a_power_loss(runs, count=300, seed=0, ignore=(ignored,))


def test_a_checkpoint_that_a_killed_process_left_becomes_durable_before_it_is_resumed_from(
    tmp_path,
):
    store = Logging()
    write_checkpoint(store, tmp_path, make(1))
    store.log.clear()
    assert detach_after(store, tmp_path, tmp_path / "checkpoints" / "step-000000000001") == []
    assert ("sync_dir", tmp_path / "checkpoints", None) in store.log


def test_a_resume_from_an_older_checkpoint_says_what_it_sets_aside_and_keeps_it_whole(
    tmp_path, caplog
):
    def train(**options):
        return quiet(
            steps=4,
            batch_size=8,
            run_dir=tmp_path,
            checkpoint=Checkpoint(every="2 steps", background=False),
            **options,
        ).run(Tiny())

    train()
    train(resume=tmp_path / "checkpoints" / "step-000000000002")
    assert "set aside, whole: step-000000000004.left-1" in caplog.text
    aside = tmp_path / "checkpoints" / "step-000000000004.left-1"
    assert verify_checkpoint(Store(), aside) == []
    assert load_snapshot(aside).meta["step"] == 4
