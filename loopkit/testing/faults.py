"""check_faults: kills, power losses and a full disk cost at most the steps since the last save."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loopkit.fit.fit import Fit
from loopkit.loggers.jsonl import read_rows
from loopkit.options import Checkpoint
from loopkit.task import Task
from loopkit.testing.disk import Operation
from loopkit.testing.forks import MEMORY, Counting, Ended, FailAt, KillAt, in_fork, injecting
from loopkit.testing.power_loss import Promises, check_what_is_left, crashes
from loopkit.testing.recording import read_log, recording
from loopkit.testing.trace import Trace, train

RUN_DIR = Path("runs", "checked")


@dataclass(frozen=True)
class FaultReport:
    """How many faults were injected. None cost a promised save, a row or a bit.

    Attributes:
        operations: the file operations of the whole run.
        kills: SIGKILL right before an operation of the store.
        full_disks: "no space left" from an operation of the store on.
        power_losses: states of the disk after a power loss.
        resumes: how many of all these runs were resumed to their end, and compared.
    """

    operations: int
    kills: int
    full_disks: int
    power_losses: int
    resumes: int


@dataclass(frozen=True)
class _Job:
    """One task with its options, and the run that nothing disturbs."""

    task: Task
    fit: Fit
    changes: dict[str, Any]
    ignore: str

    def train(self, run_dir: Path, *hooks: Any) -> dict[str, Any]:
        """Train to the end, from what is in the directory; returns the trace as plain values."""
        return asdict(
            train(self.task, self.fit, run_dir, *hooks, ignore=self.ignore, **self.changes)
        )

    def resumed(self, run_dir: Path, whole: Trace, what: str) -> None:
        """Resume to the end, and compare.

        Raises:
            AssertionError: the run fails, or is another run.
        """
        ended = in_fork(partial(self.train, run_dir))
        if ended.code:
            raise AssertionError(f"{what}: the resumed run ended with {ended.code}: {ended.error}")
        found = Trace(**ended.value)
        # The steps before the checkpoint were taken by a process that is gone.
        found.losses = {**whole.losses, **found.losses}
        different = whole.differences(found)
        if different:
            raise AssertionError(f"{what}: the resumed run differs: {'; '.join(different[:8])}")


def check_faults(
    task: Task,
    fit: Fit,
    *,
    steps: int = 8,
    kills: int = 8,
    full_disks: int = 3,
    power_losses: int = 200,
    resumes: int = 4,
    seed: int = 0,
    ignore: str = "",
    forget: tuple[str, ...] = (),
) -> FaultReport:
    """Check that no fault costs more than the steps since the last save.

    Copies of the task are trained in forked processes of one rank. After each kill and full disk
    the run is resumed to its end and compared with a run that nothing disturbed, bit by bit. After
    each power loss the newest promised save must be found and be whole, with each row of the log
    up to it; some of these runs are resumed to their end too.

    Args:
        task: the task.
        fit: the options of a short run; ``run_dir``, ``loggers``, ``checkpoint`` and ``resume``
            are replaced.
        steps: the steps to train.
        kills: how often to kill, spread evenly over the operations of the store.
        full_disks: how often the disk is full, spread in the same way.
        power_losses: how many states of the disk to check.
        resumes: how many of these to resume.
        seed: of the states.
        ignore: a regular expression of names of values that may differ, such as times.
        forget: kinds of operations that the disk forgets ("sync", "sync_dir"): a check that still
            passes would find nothing.

    Raises:
        AssertionError: something is lost, or a resumed run is another run.
        OptionError: this process cannot fork, or has used a CUDA device.
    """
    save = Checkpoint(every=f"{max(1, steps // 3)} steps", keep=2)
    single = {"strategy": "single", "devices": "auto", "steps": steps, "checkpoint": save}
    job = _Job(task, fit, single, ignore)
    with tempfile.TemporaryDirectory(prefix="loopkit-check-", dir=MEMORY) as name:
        place = Path(os.path.realpath(name))
        root = place / "whole"
        root.mkdir()
        whole, count, operations = _whole(job, root, place / "log")
        rows = read_rows(root / RUN_DIR / "metrics.jsonl")
        disturb = partial(_disturb, job, place, whole)
        for at in _evenly(kills, count):
            disturb(f"killed at operation {at}", KillAt(at), -signal.SIGKILL)
        for at in _evenly(full_disks, count):
            disturb(f"disk full from operation {at}", FailAt(at, onwards=True), 1)
        chosen = random.Random(seed)
        resumed = set(chosen.sample(range(power_losses), min(resumes, power_losses)))
        states = crashes(operations, root, power_losses, seed, ignore=forget)
        for number, crashed in enumerate(states):
            check_what_is_left(crashed, RUN_DIR, rows, lambda snapshot: None)
            if number in resumed:
                what = f"power lost after operation {crashed.number}"
                job.resumed(crashed.path / RUN_DIR, whole, what)
    return FaultReport(
        len(operations), kills, full_disks, power_losses, kills + full_disks + len(resumed)
    )


def _whole(job: _Job, root: Path, log: Path) -> tuple[Trace, int, list[Operation]]:
    """Train undisturbed; return the trace, the number of the store's operations, and all of them."""

    def act() -> dict[str, Any]:
        store = Counting()
        with recording(root, log) as recorder, injecting(store):
            trace = job.train(root / RUN_DIR, Promises(recorder))
        return {"trace": trace, "count": len(store.log)}

    ended = in_fork(act)
    if ended.code:
        raise AssertionError(f"the run fails undisturbed, with {ended.code}: {ended.error}")
    return Trace(**ended.value["trace"]), ended.value["count"], read_log(log)


def _disturb(
    job: _Job, place: Path, whole: Trace, what: str, store: Counting, expected: int
) -> None:
    """Disturb a run by ``store``, and resume it."""
    run_dir = place / what.replace(" ", "-")

    def act() -> dict[str, Any]:
        with injecting(store):
            return job.train(run_dir)

    ended: Ended = in_fork(act)
    # Operations of a background save come in another order each time: some runs get through.
    if ended.code not in (0, expected):
        raise AssertionError(f"{what}: the run ended with {ended.code}: {ended.error}")
    job.resumed(run_dir, whole, what)


def _evenly(number: int, count: int) -> list[int]:
    """Return ``number`` of the numbers from 1 to ``count``, evenly spaced."""
    return [1 + (2 * each + 1) * count // (2 * number) for each in range(number)]
