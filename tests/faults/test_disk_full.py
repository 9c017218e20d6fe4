"""A disk that fills, a file size limit, a device that fails: the last valid checkpoint stays,
nothing half is left.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "checkpoint"))

from snapshots import alike, make

from loopkit.checkpoint import (
    BackgroundWriter,
    RunLock,
    Snapshot,
    Store,
    apply_retention,
    load_newest,
    write_checkpoint,
)
from loopkit.checkpoint.tools import export_model
from loopkit.errors import CheckpointError, DiskFullError, LoopkitError, RunDirError
from loopkit.testing.forks import MEMORY, Counting, FailAt, in_fork


@pytest.fixture(scope="module")
def operations(tmp_path_factory):
    store, run_dir = Counting(), tmp_path_factory.mktemp("count")
    write_checkpoint(Store(), run_dir, make(1))
    write_checkpoint(store, run_dir, make(2))
    return store.log


@pytest.fixture
def fast_path():
    """Files in memory, which sync fast; the failures are made by the store, not by the disk."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


def names(run_dir: Path) -> list[str]:
    return sorted(os.listdir(run_dir / "checkpoints"))


def intact(run_dir: Path, committed: bool) -> None:
    """Nothing half is left, and the newest is whole: save 2 when it got through to its name, else
    save 1.
    """
    step = 2 if committed else 1
    assert names(run_dir) == ["latest", *(f"step-{n:012d}" for n in range(1, step + 1))]
    assert alike(load_newest(Store(), run_dir)[1], make(step))


CODES = [
    (errno.ENOSPC, DiskFullError),
    (errno.EDQUOT, DiskFullError),
    (errno.EFBIG, DiskFullError),
    (errno.EROFS, RunDirError),
    (errno.EACCES, RunDirError),
    (errno.EIO, CheckpointError),
]


@pytest.mark.parametrize(
    ("code", "kind"),
    CODES,
    ids=lambda value: errno.errorcode.get(value, "") if isinstance(value, int) else "",
)
def test_a_failure_at_any_operation_of_a_save(fast_path, operations, code, kind):
    renamed = next(n for n, (name, _) in enumerate(operations, 1) if name == "rename")
    for count, (operation, path) in enumerate(operations, 1):
        run_dir = fast_path / str(count)
        run_dir.mkdir()
        write_checkpoint(Store(), run_dir, make(1))
        with pytest.raises(LoopkitError) as caught:
            write_checkpoint(FailAt(count, code), run_dir, make(2))
        # The names of a directory are the only thing a save reads.
        assert isinstance(
            caught.value, CheckpointError if operation in ("names", "stat") else kind
        ), operation
        named = str(caught.value)
        assert str(run_dir) in named
        # The directory of the run itself has another name here than where they were counted.
        assert path.name in named or path.name.startswith((".staging-", "count"))
        intact(run_dir, committed=count > renamed)
        shutil.rmtree(run_dir)


def test_a_full_disk_names_the_file_what_was_wanted_and_what_is_free(tmp_path, operations):
    wanted = next(
        n
        for n, (name, path) in enumerate(operations, 1)
        if name == "write" and path.name == "model.safetensors"
    )
    write_checkpoint(Store(), tmp_path, make(1))
    with pytest.raises(
        DiskFullError, match=r"model\.safetensors of \d+ bytes: no room; \d+ bytes are free"
    ) as caught:
        write_checkpoint(FailAt(wanted), tmp_path, make(2))
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.exit_code == 74


def test_a_disk_that_stays_broken_leaves_the_last_valid_checkpoint(tmp_path, operations):
    # Cleaning up fails too then; the next start does it.
    for count in range(1, len(operations), 4):
        run_dir = tmp_path / str(count)
        run_dir.mkdir()
        write_checkpoint(Store(), run_dir, make(1))
        with pytest.raises(LoopkitError):
            write_checkpoint(FailAt(count, errno.EIO, onwards=True), run_dir, make(2))
        assert load_newest(Store(), run_dir)[1].meta["step"] in (1, 2)


def test_retention_that_fails_at_any_operation_deletes_nothing_it_should_keep(tmp_path):
    (tmp_path / "made").mkdir()
    for step in (1, 2):
        write_checkpoint(Store(), tmp_path / "made", make(step))

    def prepare(run_dir: Path) -> Path:
        return Path(shutil.copytree(tmp_path / "made", run_dir))

    store = Counting()
    apply_retention(store, prepare(tmp_path / "count"), keep=1)
    for count in range(1, len(store.log) + 1):
        run_dir = prepare(tmp_path / str(count))
        with suppress(LoopkitError):
            apply_retention(FailAt(count, errno.EIO), run_dir, keep=1)
        assert alike(load_newest(Store(), run_dir)[1], make(2))
        shutil.rmtree(run_dir)


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def big(step: int, size: int) -> Snapshot:
    return Snapshot({"model": {"w": torch.full((size // 4,), float(step))}}, {}, {"step": step})


def test_a_disk_that_is_really_full(small_disk):
    write_checkpoint(Store(), small_disk, big(1, 1 << 20))
    with pytest.raises(DiskFullError, match=r"model\.safetensors") as caught:
        write_checkpoint(Store(), small_disk, big(2, 1 << 20))
    assert caught.value.errno == errno.ENOSPC
    assert names(small_disk) == ["latest", "step-000000000001"]
    assert alike(load_newest(Store(), small_disk)[1].tensors, big(1, 1 << 20).tensors)
    # Room again: the next save gets through.
    write_checkpoint(Store(), small_disk, big(3, 1 << 18))
    assert load_newest(Store(), small_disk)[0].name == "step-000000000003"


def test_a_disk_that_is_really_full_in_the_background(small_disk):
    with BackgroundWriter(Store(), small_disk) as writer:
        writer.submit(big(1, 1 << 20))
        assert len(writer.wait()) == 1
        writer.submit(big(2, 1 << 20))
        with pytest.raises(DiskFullError):
            writer.wait()
        assert writer.wait() == []
    assert names(small_disk) == ["latest", "step-000000000001"]


def test_an_export_to_a_full_disk_leaves_nothing(small_disk, tmp_path):
    path = write_checkpoint(Store(), tmp_path, big(1, 4 << 20))
    with pytest.raises(DiskFullError):
        export_model(path, small_disk / "out")
    assert os.listdir(small_disk) == []


def test_a_file_size_limit(tmp_path):
    write_checkpoint(Store(), tmp_path, big(1, 1 << 16))

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
        with pytest.raises(DiskFullError, match="the file size limit is reached") as caught:
            write_checkpoint(Store(), tmp_path, big(2, 1 << 20))
        assert caught.value.errno == errno.EFBIG

    assert in_fork(act).code == 0
    assert names(tmp_path) == ["latest", "step-000000000001"]


def test_a_read_only_file_system_is_refused_at_the_lock(small_disk):
    write_checkpoint(Store(), small_disk, big(1, 1 << 10))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RunDirError, match="Read-only file system"):
        RunLock(small_disk)
    with pytest.raises(RunDirError, match="Read-only file system"):
        write_checkpoint(Store(), small_disk, big(2, 1 << 10))
    assert load_newest(Store(), small_disk)[1].meta["step"] == 1
