from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from snapshots import alike, make

from loopkit.checkpoint import (
    BackgroundWriter,
    Snapshot,
    Store,
    apply_retention,
    load_newest,
    newest_valid,
    read_checkpoint,
    write_checkpoint,
)
from loopkit.errors import CheckpointError, RunDirError
from tests import fork_server


class Gate(Store):
    """Holds the first write until it is opened."""

    def __init__(self) -> None:
        self.reached, self.open_gate = threading.Event(), threading.Event()

    def _op(self, kind, path, extra=None):
        if kind == "create":
            self.reached.set()
            assert self.open_gate.wait(30)


class Failing(Store):
    failures = 1

    def _op(self, kind, path, extra=None):
        if kind == "write" and self.failures:
            self.failures -= 1
            raise OSError(5, "Input/output error")


def test_what_is_changed_after_submit_is_not_in_the_checkpoint(tmp_path):
    snapshot, store = make(1), Gate()
    with BackgroundWriter(store, tmp_path) as writer:
        writer.submit(snapshot)
        for named in snapshot.tensors.values():
            for tensor in named.values():
                tensor.zero_()
        snapshot.state["rng"].zero_()
        snapshot.state["array"][:] = 0
        snapshot.state["counters"]["step"] = -1
        snapshot.meta["step"] = 99
        snapshot.files.clear()
        snapshot.tensors.clear()
        store.open_gate.set()
        (path,) = writer.wait()
    assert alike(read_checkpoint(Store(), path), make(1))


def test_submit_returns_while_the_save_is_in_flight_and_poll_does_not_wait(tmp_path):
    store = Gate()
    writer = BackgroundWriter(store, tmp_path)
    writer.submit(make(1))
    assert store.reached.wait(30)
    assert writer.busy
    assert writer.poll() == []
    assert newest_valid(Store(), tmp_path) is None
    store.open_gate.set()
    assert [path.name for path in writer.wait()] == ["step-000000000001"]
    assert writer.poll() == []
    assert not writer.busy
    writer.close()


def test_a_second_submit_waits_for_the_first(tmp_path):
    store = Gate()
    writer = BackgroundWriter(store, tmp_path)
    writer.submit(make(1))
    threading.Timer(0.2, store.open_gate.set).start()
    writer.submit(make(2))
    assert newest_valid(Store(), tmp_path).name >= "step-000000000001"
    assert [path.name for path in writer.close()] == ["step-000000000001", "step-000000000002"]


def test_buffers_are_kept_between_saves_and_tied_weights_stay_tied(tmp_path):
    writer = BackgroundWriter(Store(), tmp_path)
    held = []
    for seed in (1, 2):
        writer.submit(make(seed))
        held.append(
            {
                key: buffer.data_ptr()
                for key, buffer in writer._buffers.kept.items()
                if buffer.numel()
            }
        )
        assert alike(read_checkpoint(Store(), writer.wait()[0]), make(seed))
    same = [key for key in held[0] if held[0][key] == held[1].get(key)]
    assert ("model", "embed.weight") in same
    assert ("model", "head.weight") not in held[0]
    writer.close()
    assert writer._buffers.kept == {}


def test_shapes_may_change_between_saves(tmp_path):
    with BackgroundWriter(Store(), tmp_path) as writer:
        for step, size in enumerate((3, 5, 2), 1):
            writer.submit(
                Snapshot({"model": {"w": torch.full((size,), float(step))}}, {}, {"step": step})
            )
            assert alike(
                read_checkpoint(Store(), writer.wait()[0]).tensors["model"]["w"],
                torch.full((size,), float(step)),
            )


@pytest.mark.parametrize("ask", ["poll", "wait", "submit", "close"])
def test_a_failure_is_raised_once_and_the_next_save_goes_on(tmp_path, ask):
    write_checkpoint(Store(), tmp_path, make(1))
    writer = BackgroundWriter(Failing(), tmp_path)
    writer.submit(make(2))
    while writer.busy:
        time.sleep(0.005)
    with pytest.raises(CheckpointError, match="Input/output error"):
        writer.submit(make(3)) if ask == "submit" else getattr(writer, ask)()
    assert writer.wait() == []
    assert alike(load_newest(Store(), tmp_path)[1], make(1))
    writer.submit(make(3))
    assert [path.name for path in writer.wait()] == ["step-000000000003"]


def test_what_cannot_be_saved_is_raised_by_submit_itself(tmp_path):
    with BackgroundWriter(Store(), tmp_path) as writer, pytest.raises(TypeError, match=r"hooks\.H"):
        writer.submit(Snapshot({}, {"hooks": {"H": object()}}, {"step": 1}))


def test_after_runs_in_the_thread_once_the_checkpoint_is_durable(tmp_path):
    seen = []

    def after(path: Path) -> None:
        seen.append(
            (
                threading.current_thread() is not threading.main_thread(),
                newest_valid(Store(), tmp_path) == path,
            )
        )
        apply_retention(Store(), tmp_path, keep=1)

    with BackgroundWriter(Store(), tmp_path, after=after) as writer:
        for seed in (1, 2, 3):
            writer.submit(make(seed))
    assert seen == [(True, True)] * 3
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-000000000003"]


def test_a_failure_after_a_save_is_raised_and_the_path_is_still_told(tmp_path):
    def after(path: Path) -> None:
        raise RunDirError("no more")

    writer = BackgroundWriter(Store(), tmp_path, after=after)
    writer.submit(make(1))
    with pytest.raises(RunDirError, match="no more"):
        writer.wait()
    assert [path.name for path in writer.poll()] == ["step-000000000001"]


PROGRAM = """
import sys, torch, time
sys.path[:0] = [{tests!r}]
from pathlib import Path
from snapshots import make
from loopkit.checkpoint import BackgroundWriter, Store
class Slow(Store):
    def _op(self, kind, path, extra=None):
        if kind == "create" and path.name == "state.json":
            print("here", flush=True)
            time.sleep({sleep})
writer = BackgroundWriter(Slow(), Path({run_dir!r}))
writer.submit(make(2))
"""


def program(run_dir: Path, sleep: float) -> subprocess.Popen:
    text = PROGRAM.format(tests=str(Path(__file__).parent), run_dir=str(run_dir), sleep=sleep)
    root = str(Path(__file__).parents[2])
    return fork_server.Popen(
        [sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE
    )


def test_a_program_that_ends_finishes_its_last_save(tmp_path):
    with program(tmp_path, 0.3) as process:
        assert process.wait(60) == 0
    assert alike(load_newest(Store(), tmp_path)[1], make(2))


def test_a_kill_during_a_background_save_leaves_the_one_before(tmp_path):
    write_checkpoint(Store(), tmp_path, make(1))
    with program(tmp_path, 60) as process:
        assert process.stdout.readline() == b"here\n"
        process.send_signal(signal.SIGKILL)
    assert alike(load_newest(Store(), tmp_path)[1], make(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_device_may_be_changed_right_after_submit(tmp_path):
    source = torch.arange(1 << 24, device="cuda", dtype=torch.float32)
    with BackgroundWriter(Store(), tmp_path) as writer:
        for step in (1, 2, 3):
            expected = source.cpu()
            writer.submit(
                Snapshot(
                    {"model": {"w": source, "tied": source}}, {"a": source[:5]}, {"step": step}
                )
            )
            assert writer._buffers.kept["model", "w"].is_pinned()
            source.mul_(2).add_(1)
            (path,) = writer.wait()
            got = read_checkpoint(Store(), path)
            assert torch.equal(got.tensors["model"]["w"], expected)
            assert torch.equal(got.state["a"], expected[:5])
