"""A store that fails, is slow, or loses its writer: nothing wrong in it, and training continues."""

from __future__ import annotations

import os
import signal
import threading
import time
from unittest import mock

import pytest

from loopkit import Checkpoint
from loopkit.checkpoint import RunLock, Store, apply_retention, load_newest, write_checkpoint
from loopkit.errors import LoopkitError, LoopkitWarning, RunDirError, StorageError
from loopkit.storage import Kept, RunStorage, local_copy_of, mirror, owner
from loopkit.storage.copies import open_remote
from loopkit.testing.forks import Forked
from tests.checkpoint.snapshots import alike, make
from tests.storage.stores import LAST, at_requests, fit, held, names, until, whole
from tests.support import Tiny, digest


def test_every_request_may_fail_once_and_again(url, on_disk, other_machine):
    failed = set()

    def fault(number, kind, name):
        if number % 3 and (kind, name, number % 3) not in failed:
            failed.add((kind, name, number % 3))
            raise OSError(5, "injected")

    with at_requests(fault) as log:
        until(6, url)
        other_machine()
        task = Tiny(noisy=True)
        fit(url, resume="auto").run(task)
    assert digest(task.state_dict()) == on_disk[1]
    assert len(failed) > 40, log
    assert all(problems == [] for problems in held(url).values())
    assert LAST in held(url)


def test_a_store_that_hangs_holds_no_step_and_is_waited_for_at_the_end(url, on_disk):
    trained = threading.Event()

    def fault(number, kind, name):
        if kind == "write" and "step-" in name:
            assert trained.wait(60)

    one = fit(url)
    one.on("step_end", lambda run, out: trained.set() if run.progress.step == 16 else None)
    task = Tiny(noisy=True)
    with at_requests(fault):  # it never writes before the last step is done
        one.run(task)
    assert digest(task.state_dict()) == on_disk[1]
    assert LAST in held(url)


def test_a_store_that_stays_down_ends_the_run_with_a_line_that_says_where_everything_is(
    url,
    on_disk,
    monkeypatch,
):
    monkeypatch.setattr(mirror, "PATIENCE", 0.05)
    monkeypatch.setattr(mirror, "WARN_AFTER", 0.0)
    down = True

    def fault(number, kind, name):
        if down and kind == "write" and "step-" in name:
            raise ConnectionError("cable")

    with at_requests(fault):
        with (
            pytest.warns(LoopkitWarning, match=r"has failed for .*cable. Training continues"),
            pytest.raises(StorageError) as caught,
        ):
            until(9, url, checkpoint=Checkpoint(every=1))
        assert "cannot write" in str(caught.value)
        assert f"The run is whole in {local_copy_of(url)}" in str(caught.value)
        assert caught.value.exit_code == 73
        monkeypatch.setattr(mirror, "WARN_AFTER", 60.0)
        # A signal's exit code is not hidden.
        one = fit(url, resume="auto")
        one.on("step_end", lambda run, out: os.kill(os.getpid(), signal.SIGTERM))
        with (
            pytest.warns(LoopkitWarning, match="is not complete"),
            pytest.raises(SystemExit) as end,
        ):
            one.run(Tiny(noisy=True))
        assert end.value.code == 143
        down = False
        task = Tiny(noisy=True)
        fit(url, resume="auto").run(task)
    assert digest(task.state_dict()) == on_disk[1]
    assert LAST in held(url)


def test_ctrl_c_ends_the_wait_for_a_store_at_once(url, monkeypatch):
    waits = threading.Event()
    finish = mirror.Mirror.finish

    def noted(self):
        waits.set()
        return finish(self)

    def fault(number, kind, name):
        if kind == "write" and "step-" in name:
            if waits.is_set():
                waits.clear()
                os.kill(os.getpid(), signal.SIGINT)
            raise ConnectionError("cable")

    monkeypatch.setattr(mirror.Mirror, "finish", noted)
    with (
        at_requests(fault),
        pytest.warns(LoopkitWarning, match=r"Ctrl-C ended it. The run is whole in"),
    ):
        fit(url, steps=4).run(Tiny(noisy=True))


@pytest.mark.parametrize("keep", [2, None])
def test_the_space_on_this_machine_is_bounded_while_the_store_is_slow(url, keep, monkeypatch):
    monkeypatch.setattr(mirror, "MOST_WAITING", 3)
    go = threading.Event()
    most = []

    def fault(number, kind, name):
        if kind == "write" and "step-" in name:
            assert go.wait(60)

    one = fit(url, eval_every="never", checkpoint=Checkpoint(every=1, keep=keep))

    def count(run, path):
        most.append(len(whole(run.run_dir)))
        if run.progress.step == 16:
            go.set()

    one.on("save", count)
    with at_requests(fault):
        if keep is None:
            with pytest.warns(LoopkitWarning, match="more slowly than they are saved: step-0"):
                result = one.run(Tiny(noisy=True))
        else:
            result = one.run(Tiny(noisy=True))
    assert max(most) <= 6
    assert whole(result.run_dir) == [LAST]
    assert LAST in held(url)


def write(url: str, steps: tuple[int, ...]) -> None:
    """A run without training: it opens the place, saves, deletes and uploads."""
    local = local_copy_of(url)
    local.mkdir(parents=True, exist_ok=True)
    with RunLock(local):
        storage = RunStorage(url, local, kept=Kept(keep=1))
        storage.open("auto")
        newest = load_newest(Store(), local)
        if newest is not None:
            storage.continues_from(newest[0])
        storage.start()
        for step in steps:
            (local / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
            write_checkpoint(Store(), local, make(step))
            apply_retention(Store(), local, keep=1)
            storage.saved()
        storage.close(raises=True)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
def test_a_kill_at_any_request_leaves_only_whole_checkpoints_and_loses_none(
    tmp_path, monkeypatch, stride
):
    """Every request of a first start, of a second one on another machine, and of retention."""
    count = 0
    while True:
        count += stride
        url = f"file://{tmp_path}/store-{count}/run"
        machines = [str(tmp_path / f"machine-{count}-{n}") for n in range(3)]
        monkeypatch.setenv("LOOPKIT_STAGING", machines[0])
        write(url, (1,))
        known = set(held(url))

        def killed(url=url, count=count, machines=machines):
            os.environ["LOOPKIT_STAGING"] = machines[1]

            def fault(number, kind, name):
                if number == count:
                    os.kill(os.getpid(), signal.SIGKILL)

            with at_requests(fault):
                write(url, (2, 3))

        ended = Forked(killed).wait(time.monotonic() + 60)
        assert ended.code in (0, -signal.SIGKILL), ended.error
        after = held(url)
        assert all(problems == [] for problems in after.values()), (count, after)
        assert set(after) >= known or max(after) > max(known), (count, after)
        # The same machine continues from what it had saved, another one from what the store has.
        for machine in (machines[1], machines[2]):
            monkeypatch.setenv("LOOPKIT_STAGING", machine)
            expected = max([*whole(local_copy_of(url)), *held(url)])
            write(url, ())
            path, snapshot = load_newest(Store(), local_copy_of(url))
            assert path.name == expected
            assert alike(snapshot, make(int(expected[5:])))
        assert list(held(url)) == [expected]
        assert [n for n in names(url) if n.startswith("checkpoints/") and expected not in n] == [
            "checkpoints/latest"
        ]
        if ended.code == 0:
            break
    assert count > 25


def opened(url: str, **options) -> RunStorage:
    local = local_copy_of(url)
    local.mkdir(parents=True, exist_ok=True)
    storage = RunStorage(url, local, **options)
    storage.open("auto")
    return storage


def test_two_runs_do_not_write_to_one_place(url, other_machine, monkeypatch):
    monkeypatch.setattr(owner, "BEAT", 0.02)
    monkeypatch.setattr(owner, "LEASE", 60.0)
    first = opened(url)
    other_machine()
    with (
        mock.patch.object(os, "getpid", return_value=1),
        pytest.raises(RunDirError, match="is in use by process"),
    ):
        opened(url)
    first.start()
    first.close(raises=True)
    opened(url).close(raises=True)  # it was released, so nobody waits


def test_a_run_that_was_silent_is_replaced_and_uploads_nothing_more(
    url, other_machine, monkeypatch
):
    monkeypatch.setattr(owner, "BEAT", 3600.0)
    said = []
    first = opened(url)
    write_checkpoint(Store(), first.local, make(1))
    other_machine()
    with mock.patch.object(os, "getpid", return_value=1):
        second = opened(url, say=said.append)
    assert "was in use by process" in said[0]
    first._owner._renew_once()
    first.start()
    with pytest.raises(RunDirError, match="was taken over by process 1 on"):
        first.saved()
    with pytest.raises(StorageError, match="taken over"):
        first.close(raises=True)
    second.start()
    second.close(raises=True)
    assert held(url) == {}


def test_a_manifest_is_never_replaced(url, tmp_path):
    remote = open_remote(url)
    assert remote.put_new("a", b"1")
    assert remote.put_new("a", b"1")  # an answer was lost, and the request came again
    assert not remote.put_new("a", b"2")
    assert remote.read("a", 9) == b"1"
    assert names(url) == ["a"]


def test_a_store_that_refuses_says_so_before_the_first_step(url):
    def fault(number, kind, name):
        raise PermissionError("Access Denied")

    seen = []
    one = fit(url)
    one.on("step_start", lambda run, batches: seen.append(1))
    with (
        at_requests(fault) as log,
        pytest.raises(StorageError, match=f"cannot read {url}/.owner.json: Access Denied"),
    ):
        one.run(Tiny(noisy=True))
    assert seen == []
    assert len(log) == 1  # not tried again
    assert isinstance(StorageError(), LoopkitError)
