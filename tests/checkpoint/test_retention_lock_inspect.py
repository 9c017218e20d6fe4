from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from snapshots import alike, make

from loopkit.checkpoint import (
    Entry,
    RunLock,
    Snapshot,
    Store,
    apply_retention,
    newest_valid,
    read_checkpoint,
    to_delete,
    write_checkpoint,
)
from loopkit.checkpoint.manifest import Manifest
from loopkit.checkpoint.tools import diff_checkpoints, export_model, list_checkpoints, verify_tree
from loopkit.errors import CheckpointError, CorruptCheckpointError, OptionError, RunDirError
from loopkit.monitor import Monitor
from tests import fork_server

# Retention
# --------------------------------------------------------------------------------------------------


def entry(
    step: int,
    value: float | None = None,
    generation: int = 1,
    kind: str = "full",
    problem: str | None = None,
) -> Entry:
    metrics = {} if value is None else {"m": value}
    manifest = (
        None
        if problem
        else Manifest({"step": step, "kind": kind, "metrics": metrics}, generation, {}, {})
    )
    return Entry(Path(f"{step}-{generation}-{kind}"), step, generation, manifest, problem)


def left(entries: list[Entry], **rule: object) -> list[int]:
    gone = set(to_delete(entries, **rule))
    return [e.step for e in entries if e.path not in gone]


STEPS = [entry(1, 0.5), entry(2, 0.9), entry(3, 0.9), entry(4, 0.1), entry(5, math.nan), entry(6)]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"keep": None}, [1, 2, 3, 4, 5, 6]),
        ({"keep": 1}, [6]),
        ({"keep": 3}, [4, 5, 6]),
        ({"keep": 9}, [1, 2, 3, 4, 5, 6]),
        ({"keep": 1, "best": Monitor("m", "max")}, [2, 6]),
        ({"keep": 1, "best": Monitor("m", "max"), "keep_best": 2}, [2, 3, 6]),
        ({"keep": 1, "best": Monitor("m", "max"), "keep_best": 0}, [2, 6]),
        ({"keep": 2, "best": Monitor("m", "min")}, [4, 5, 6]),
        ({"keep": 1, "best": Monitor("unknown", "max")}, [6]),
    ],
)
def test_the_newest_and_the_best_are_kept(rule, expected):
    assert left(STEPS, **rule) == expected
    shuffled = random.Random(0).sample(STEPS, len(STEPS))
    assert sorted(left(shuffled, **rule)) == expected


def test_what_is_not_good_is_neither_counted_nor_deleted():
    entries = [entry(1), entry(2), entry(3, problem="x"), entry(4, problem="y")]
    assert left(entries, keep=1) == [2, 3, 4]


def test_the_newest_of_each_kind_is_kept():
    entries = [entry(1), entry(2), entry(3, kind="weights"), entry(4, kind="weights")]
    assert left(entries, keep=1) == [2, 4]


def test_a_later_generation_is_newer():
    entries = [entry(1), entry(1, generation=2), entry(1, generation=10)]
    assert to_delete(entries, keep=1) == [Path("1-1-full"), Path("1-2-full")]


@pytest.mark.parametrize(
    "rule",
    [
        {"keep": 0},
        {"keep": -1},
        {"keep": 1, "best": Monitor("m", "max"), "keep_best": -1},
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule):
    with pytest.raises(OptionError):
        to_delete(STEPS, **rule)


def test_apply_reads_back_what_it_counts(tmp_path):
    paths = [write_checkpoint(Store(), tmp_path, make(step)) for step in (1, 2, 3)]
    data = bytearray((paths[2] / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (paths[2] / "model.safetensors").write_bytes(data)
    trusted: set[Path] = set()
    assert apply_retention(Store(), tmp_path, keep=1, trusted=trusted) == [paths[0]]
    assert trusted == {paths[1]}
    assert newest_valid(Store(), tmp_path, warn=lambda text: None) == paths[1]


def test_apply_does_not_read_again_what_is_trusted(tmp_path):
    class Reads(Store):
        count = 0

        def _op(self, kind, path, extra=None):
            self.count += kind == "read" and path.suffix == ".safetensors"

    paths = {write_checkpoint(Store(), tmp_path, make(step)) for step in (1, 2)}
    store = Reads()
    assert apply_retention(store, tmp_path, keep=5, trusted=paths) == []
    assert store.count == 0


def test_apply_does_not_touch_what_is_not_a_checkpoint(tmp_path):
    for step in (1, 2):
        write_checkpoint(Store(), tmp_path, make(step))
    parent = tmp_path / "checkpoints"
    (parent / "mine").mkdir()
    (parent / "step-7").mkdir()
    (parent / "step-000000000000.corrupt-1").mkdir()
    (parent / "step-000000000000").symlink_to(parent / "mine")
    apply_retention(Store(), tmp_path, keep=1)
    assert sorted(os.listdir(parent)) == [
        "latest",
        "mine",
        "step-000000000000",
        "step-000000000000.corrupt-1",
        "step-000000000002",
        "step-7",
    ]


# Lock
# -------------------------------------------------------------------------------------------------------

HOLD = """
import os, sys, time
from pathlib import Path
from loopkit.checkpoint import RunLock
lock = RunLock(Path(sys.argv[1]), "run-7")
speaks = sys.argv[2] != "fork" or os.fork() == 0  # the child, once it runs: it lets go of its copy just before
if speaks:
    print("held", flush=True)
time.sleep(60)
"""


def holder(run_dir: Path, how: str = "") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", HOLD, str(run_dir), how]
    process = fork_server.Popen(
        command, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_run_in_one_directory_is_refused_naming_the_first(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(
            RunDirError,
            match=rf"'run-7', process {process.pid} on {os.uname().nodename}, started 20",
        ):
            RunLock(tmp_path)
        process.kill()
    RunLock(tmp_path).release()


def test_a_child_that_outlives_its_run_does_not_hold_the_directory(tmp_path):
    with holder(tmp_path, "fork") as process:
        process.kill()
        process.wait()
        try:
            RunLock(tmp_path).release()
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_child_that_ends_does_not_release_its_parent_s_directory(tmp_path):
    with RunLock(tmp_path):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(RunDirError, match="in use by process"):
            RunLock(tmp_path)


def test_one_process_cannot_hold_a_directory_twice(tmp_path):
    first = RunLock(tmp_path, "a")
    with pytest.raises(RunDirError, match="run 'a'"):
        RunLock(tmp_path)
    first.release()
    first.release()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_lock_that_is_forgotten_is_released(tmp_path):
    RunLock(tmp_path)
    RunLock(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b"garbage", b"[" * 5000, b'{"pid": 1}'])
def test_a_lock_file_with_garbage_is_only_a_worse_message(tmp_path, content):
    lock = RunLock(tmp_path)
    (tmp_path / ".lock").write_bytes(content)
    with pytest.raises(RunDirError, match="in use by another run"):
        RunLock(tmp_path)
    lock.release()


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(RunDirError, match="not there any more"):
        RunLock(tmp_path / "gone")


# Inspection
# -------------------------------------------------------------------------------------------------


def test_ls_tells_what_is_good(tmp_path):
    write_checkpoint(Store(), tmp_path, make(1, metrics={"eval/accuracy": 0.25}))
    bad = write_checkpoint(Store(), tmp_path, make(2))
    (bad / "config.json").write_bytes(b"{" * 22)
    shallow, deep = list_checkpoints(tmp_path), list_checkpoints(tmp_path, deep=True)
    assert [(e.step, e.generation, e.kind, e.problem) for e in shallow] == [
        (1, 1, "full", None),
        (2, 1, "full", None),
    ]
    assert shallow[0].metrics == {"eval/accuracy": 0.25}
    assert shallow[0].size == sum(
        p.stat().st_size for p in shallow[0].path.rglob("*") if p.is_file()
    )
    assert [e.problem is None for e in deep] == [True, False]
    assert "config.json" in deep[1].problem


def test_verify_tree_takes_a_run_a_folder_of_checkpoints_or_one(tmp_path):
    good, bad = (
        write_checkpoint(Store(), tmp_path, make(1)),
        write_checkpoint(Store(), tmp_path, make(2)),
    )
    (bad / "state.json").unlink()
    for place in (tmp_path, tmp_path / "checkpoints"):
        found = verify_tree(place)
        assert found[good] == []
        assert "state.json is missing" in found[bad][0]
    assert verify_tree(good) == {good: []}
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        verify_tree(tmp_path / "nowhere")


def test_a_checkpoint_does_not_differ_from_itself(tmp_path):
    path = write_checkpoint(Store(), tmp_path, make(1))
    assert not diff_checkpoints(path, path)


def test_diff_names_what_was_added_removed_and_changed(tmp_path):
    a, b = make(1), make(1)
    b.tensors["model"]["bias"] = a.tensors["model"]["bias"].clone()
    b.tensors["model"]["bias"][2] += 3
    b.tensors["model"]["steps"] = torch.tensor([1, 2])
    b.tensors["model"]["new"] = torch.ones(1)
    del b.tensors["optimizer"]["bias/exp_avg"]
    b.state["counters"] = {"step": 5, "samples": a.state["counters"]["samples"], "extra": True}
    b.state["hooks"]["Curve"]["window"].append(2.0)
    b.state["rng"] = a.state["rng"] + 1
    b.state["array"] = a.state["array"] + 1
    found = diff_checkpoints(
        write_checkpoint(Store(), tmp_path, a), write_checkpoint(Store(), tmp_path, b)
    )
    assert found.added == ["model:new"]
    assert found.removed == ["optimizer:bias/exp_avg"]
    assert sorted(found.changed) == ["model:bias", "model:steps", "state:rng"]
    assert found.changed["model:bias"] == pytest.approx(3, rel=0.01)
    assert found.changed["model:steps"] is None
    assert found.state["counters.step"] == (1, 5)
    assert found.state["counters.extra"] == ("<absent>", True)
    assert set(found.state) == {"array", "counters.step", "counters.extra", "hooks.Curve.window[2]"}


def test_diff_sees_nan_and_the_sign_of_zero(tmp_path):
    a = Snapshot(
        {"model": {"n": torch.tensor([math.nan, 1.0]), "z": torch.tensor([0.0])}}, {}, {"step": 1}
    )
    b = Snapshot(
        {"model": {"n": torch.tensor([math.nan, math.nan]), "z": torch.tensor([-0.0])}},
        {},
        {"step": 2},
    )
    found = diff_checkpoints(
        write_checkpoint(Store(), tmp_path, a), write_checkpoint(Store(), tmp_path, b)
    )
    assert math.isnan(found.changed["model:n"])
    assert found.changed["model:z"] == 0.0


def test_export_writes_the_model_alone(tmp_path):
    snapshot = make(1)
    snapshot.state["task"] = {
        "class": "Digits",
        "hparams": {"hidden": 32, "act": "relu"},
        "unsaved": [],
    }
    out = export_model(write_checkpoint(Store(), tmp_path, snapshot), tmp_path / "out")
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == [
        "config.json",
        "loopkit.json",
        "model.safetensors",
        "tokenizer/vocab.txt",
    ]
    assert json.loads((out / "loopkit.json").read_text()) == {
        "format": "loopkit-export",
        "task": "Digits",
        "step": 1,
        "hparams": {"hidden": 32, "act": "relu"},
    }
    theirs = load_file(out / "model.safetensors")
    assert all(alike(theirs[name], make(1).tensors["model"][name]) for name in theirs)
    assert set(snapshot.tensors["model"]) - set(theirs) == {"head.weight"}


def test_export_overwrites_nothing_and_verifies_first(tmp_path):
    path = write_checkpoint(Store(), tmp_path, make(1))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for place in ("full", "file"):
        with pytest.raises(OptionError, match="exists already"):
            export_model(path, tmp_path / place)
    export_model(path, tmp_path / "empty")
    with pytest.raises(CheckpointError, match="holds no model"):
        export_model(
            write_checkpoint(Store(), tmp_path, Snapshot({}, {}, {"step": 9})), tmp_path / "none"
        )
    (path / "config.json").unlink()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CorruptCheckpointError):
        export_model(path, tmp_path / "bad")
    assert sorted(os.listdir(tmp_path)) == before
    assert read_checkpoint(Store(), newest_valid(Store(), tmp_path)).meta["step"] == 9
