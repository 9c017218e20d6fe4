"""A path that a user gives: a checkpoint, or a run directory for its newest valid one."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from snapshots import alike, make

from loopkit.checkpoint import (
    Store,
    load_checkpoint,
    load_snapshot,
    resolve_checkpoint,
    write_checkpoint,
)
from loopkit.errors import CheckpointError, CorruptCheckpointError, NoValidCheckpointError


@pytest.fixture
def paths(tmp_path):
    return [write_checkpoint(Store(), tmp_path, make(step)) for step in (1, 2)]


def damage(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)


def test_a_checkpoint_is_itself_and_a_run_directory_its_newest(tmp_path, paths):
    assert resolve_checkpoint(paths[0]) == paths[0]
    assert resolve_checkpoint(tmp_path) == paths[1]
    found, snapshot = load_checkpoint(tmp_path)
    assert found == paths[1]
    assert alike(snapshot, make(2))
    assert alike(load_checkpoint(paths[0]), (paths[0], make(1)))
    assert alike(load_snapshot(tmp_path), make(2))


@pytest.mark.filterwarnings("ignore::loopkit.errors.LoopkitWarning")
def test_a_corrupt_newest_is_passed_over_and_keeps_its_name(tmp_path, paths):
    damage(paths[1])
    before = sorted(os.listdir(tmp_path / "checkpoints"))
    assert resolve_checkpoint(tmp_path) == paths[0]
    assert load_checkpoint(tmp_path)[0] == paths[0]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == before
    with pytest.raises(CorruptCheckpointError):
        load_checkpoint(paths[1])


def test_a_kind_passes_over_the_others(tmp_path, paths):
    weights = make(3)
    weights.meta["kind"] = "weights"
    write_checkpoint(Store(), tmp_path, weights)
    assert resolve_checkpoint(tmp_path).name == "step-000000000003"
    assert resolve_checkpoint(tmp_path, kind="full") == paths[1]


@pytest.mark.parametrize("function", [resolve_checkpoint, load_checkpoint])
def test_an_error_of_a_path_names_its_option(function, tmp_path, paths):
    (tmp_path / "file").touch()
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for name in ("nowhere", "file"):
        with pytest.raises(CheckpointError, match=rf"^--checkpoint \S+/{name}: there is no such"):
            function(tmp_path / name, option="--checkpoint ")
    with pytest.raises(
        NoValidCheckpointError, match="empty: the run directory holds no checkpoint"
    ):
        function(tmp_path / "empty")


def test_one_line_is_logged_for_each_save_and_each_load(tmp_path, caplog):
    caplog.set_level(logging.INFO, "loopkit")
    path = write_checkpoint(Store(), tmp_path, make(1))
    load_snapshot(tmp_path)
    assert caplog.messages == [f"saved checkpoint {path}", f"read checkpoint {path}"]


def test_a_task_does_not_import_the_writers_and_readers():
    code = (
        "import sys; from loopkit import Task\n"
        "print([name for name in sys.modules if name.startswith('loopkit.checkpoint.')])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert done.stdout == b"[]\n", done.stderr.decode()
