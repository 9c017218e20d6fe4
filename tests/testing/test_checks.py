"""The checks for users pass for what is right, and name what is wrong."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from loopkit import Hook
from loopkit.errors import HungError, OptionError
from loopkit.hooks import EMA
from loopkit.testing import check_faults, check_resume
from loopkit.testing.disk import Disk
from loopkit.testing.forks import in_fork, on_forked_ranks
from loopkit.testing.recording import read_log, recording
from tests import fork_server
from tests.support import Tiny, quiet


def short(**options: Any) -> Any:
    return quiet(
        **{"epochs": 2, "batch_size": 8, "eval_every": "2 steps", "log_every": "3 steps", **options}
    )


class Forgets(Tiny):
    """Scales its loss by a number that it keeps to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0

    def train_step(self, batch):
        self.scale *= 1.01
        return self.scale * super().train_step(batch)


class Differs(Tiny):
    """Knows which rank it is on."""

    def train_step(self, batch):
        return (1 + int(os.environ.get("RANK", 0))) * super().train_step(batch)


def test_a_task_that_resumes_exactly_passes():
    report = check_resume(Tiny(noisy=True), short(hooks=[EMA(0.9)]), steps=4)
    assert (report.steps, report.resumes) == (4, 3)
    assert report.values > 50


def test_state_that_no_checkpoint_holds_is_found():
    with pytest.raises(AssertionError, match=r"stopped at step 1 and resumed is .*model"):
        check_resume(Forgets(), short(), steps=3)


def test_names_may_be_left_out():
    with pytest.raises(AssertionError, match="the loss of step 2"):
        check_resume(Forgets(), short(), steps=3, ignore="model|optimizer|lr|eval|train|best|hooks")


RANKS = """
import pytest
from loopkit.testing import check_ranks
from tests.testing.test_checks import Differs, Tiny, short

report = check_ranks(Tiny(), short(), steps=3)
assert (report.steps, report.exact, report.difference) == (3, True, 0.0)
assert check_ranks(Tiny(), short(), strategy="fsdp", steps=2, tolerance=1e-6).steps == 2
with pytest.raises(AssertionError, match=r"net.\\d.\\w+ differs by"):
    check_ranks(Differs(), short(), steps=2)
print("done")
"""


def test_ranks_are_compared_in_a_process_that_has_no_threads_yet():
    done = fork_server.run(
        [sys.executable, "-c", RANKS],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.stdout.endswith("done\n"), done.stderr


def test_ranks_that_do_not_end_are_killed_with_an_error():
    with pytest.raises(HungError, match="did not end in time"):
        on_forked_ranks(2, threading.Event().wait, 0.2)


def test_faults_cost_nothing():
    report = check_faults(
        Tiny(), short(), steps=4, kills=2, full_disks=1, power_losses=60, resumes=1
    )
    assert (report.kills, report.full_disks, report.power_losses, report.resumes) == (2, 1, 60, 4)
    assert report.operations > 100


@pytest.mark.parametrize("forgotten", ["sync", "sync_dir"])
def test_a_disk_that_forgets_a_sync_is_found(forgotten):
    with pytest.raises(AssertionError):
        check_faults(
            Tiny(), short(), steps=4, kills=0, full_disks=0, power_losses=150, forget=(forgotten,)
        )


def test_a_run_that_fails_by_itself_is_named():
    with pytest.raises(AssertionError, match=r"(?s)fails undisturbed, with 1: .*ZeroDivisionError"):
        check_faults(Fails(), short(), steps=2)


class Fails(Tiny):
    """Divides by zero."""

    def train_step(self, batch):
        return super().train_step(batch) / (1 // 0)


def test_what_cannot_be_copied_is_said():
    class Holds(Hook):
        def __init__(self) -> None:
            self.file = open(os.devnull)  # noqa: SIM115 - closed with the test's process

    with pytest.raises(OptionError, match="cannot be copied"):
        check_resume(Tiny(), short(hooks=[Holds()]), steps=2)


def test_a_fork_tells_how_it_ended():
    assert in_fork(lambda: {"a": 1}).value == {"a": 1}
    assert in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL)).code == -signal.SIGKILL
    assert "ZeroDivisionError" in in_fork(lambda: 1 // 0).error


def test_every_way_to_write_a_file_is_recorded(tmp_path):
    root, log = tmp_path / "root", tmp_path / "log"
    root.mkdir()
    with recording(root, log):
        (root / "a").mkdir()
        (root / "a" / "text").write_text("one\n")
        with open(root / "a" / "text", "a") as file:
            file.write("two\n")
        handle = os.open(root / "raw", os.O_WRONLY | os.O_CREAT)
        os.write(handle, b"raw")
        os.fsync(handle)
        os.close(handle)
        (root / "raw").rename(root / "renamed")
        (root / "gone").write_bytes(b"x")
        (root / "gone").unlink()
        (tmp_path / "elsewhere").write_text("not recorded")
    disk = Disk(root)
    for operation in read_log(log):
        disk.do(operation)
    assert disk.top.names["a"].names["text"].data == b"one\ntwo\n"
    assert disk.top.names["renamed"].synced == b"raw"
    assert disk.top.names.keys() == {"a", "renamed"}
    assert disk.top.synced == {}
