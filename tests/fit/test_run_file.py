"""run.json: true while a run trains, at its end, after an error and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import pytest

from loopkit import Checkpoint
from loopkit.checkpoint import RunLock
from loopkit.errors import CheckpointError, LoopkitWarning
from loopkit.fit import origin
from loopkit.fit.origin import command_line, commit
from loopkit.run_file import RUN_FILE, read_run_file, write_run_file
from tests.support import Tiny, quiet

SAVES = Checkpoint(every="5 steps", background=False)


def plain(run_dir: Path) -> dict:
    return json.loads((run_dir / RUN_FILE).read_text())


def test_a_run_says_what_it_is_from_its_start_and_how_it_ended(tmp_path):
    seen = []
    fit = quiet(run_dir=tmp_path, epochs=2, batch_size=10, checkpoint=SAVES, seed=3)
    fit.on("step_end", lambda run, out: seen.append(read_run_file(tmp_path)), every="6 steps")
    result = fit.run(Tiny(lr=0.02))
    first, last = seen[0], read_run_file(tmp_path)
    assert (first["status"], first["ended"]) == ("running", None)
    assert (last["status"], last["task"], last["progress"]["step"]) == ("finished", "Tiny", 12)
    assert last["started"] <= last["ended"]
    assert last["hparams"]["lr"] == 0.02
    assert last["options"]["seed"] == 3
    assert last["parameters"]["total"] == sum(p.numel() for p in Tiny().parameters())
    assert last["timings"] == pytest.approx(result.timings, abs=0.06)
    assert last["peak_memory"] > 1e6
    assert last["versions"]["torch"]
    assert last["devices"]["ranks"] == 1
    assert last["command"] == command_line()
    (attempt,) = last["attempts"]
    assert (attempt["status"], attempt["from_step"], attempt["to_step"]) == ("finished", 0, 12)
    assert attempt["resumed_from"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_is_that_of_the_tasks_code(tmp_path, monkeypatch):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    code = tmp_path / "made.py"
    code.write_text("from tests.support import Tiny\nclass Made(Tiny): pass\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    made = types.ModuleType("made")
    made.__file__ = str(code)
    monkeypatch.setitem(sys.modules, "made", made)
    exec(compile(code.read_text(), str(code), "exec"), vars(made))
    clean = commit(made.Made())
    code.write_text(code.read_text() + "\n")
    origin._commit.cache_clear()  # as after some seconds
    changed = commit(made.Made())
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert clean is not None
    assert clean["id"] == head.stdout.strip()
    assert clean["clean"] is True
    assert changed is not None
    assert changed["clean"] is False


def test_a_failed_run_says_by_what_and_keeps_what_was_warned_of(tmp_path):
    class Fails(Tiny):
        def on_step_end(self, run, out):
            if run.progress.step == 7:
                warnings.warn("the sky is falling", LoopkitWarning, stacklevel=2)
                raise ZeroDivisionError("seven")

    with pytest.warns(LoopkitWarning, match="sky"), pytest.raises(ZeroDivisionError):
        quiet(run_dir=tmp_path, epochs=2, batch_size=10, checkpoint=SAVES).run(Fails())
    about = read_run_file(tmp_path)
    assert (about["status"], about["reason"]) == ("failed", "ZeroDivisionError: seven")
    (attempt,) = about["attempts"]
    assert [each["text"] for each in attempt["warnings"]] == ["the sky is falling"]
    quiet(run_dir=tmp_path, epochs=2, batch_size=10, checkpoint=SAVES, resume="auto").run(Tiny())
    about = read_run_file(tmp_path)
    assert [each["status"] for each in about["attempts"]] == ["failed", "finished"]
    assert about["attempts"][1]["from_step"] == 5
    assert about["started"] == attempt["started"]


def test_a_stop_and_its_reason_are_kept(tmp_path):
    fit = quiet(run_dir=tmp_path, epochs=9, checkpoint=SAVES)
    fit.on("step_end", lambda run, out: run.stop("enough"))
    fit.run(Tiny())
    assert (plain(tmp_path)["status"], plain(tmp_path)["reason"]) == ("stopped", "enough")


def test_a_run_that_nobody_holds_was_killed(tmp_path):
    about = {"status": "running", "host": "elsewhere", "attempts": [{"status": "running"}]}
    write_run_file(tmp_path, about)
    with RunLock(tmp_path):
        assert read_run_file(tmp_path)["status"] == "running"
    # Of another machine, whose lock may not be seen here: it has written something just now.
    assert read_run_file(tmp_path)["status"] == "running"
    os.utime(tmp_path / RUN_FILE, (1e9, 1e9))
    found = read_run_file(tmp_path)
    assert (found["status"], found["attempts"][0]["status"]) == ("killed", "killed")
    assert found["ended"].startswith("2001-09-09")
    assert plain(tmp_path)["status"] == "running"  # a reader changes nothing


def test_a_program_that_looks_at_the_lock_does_not_keep_a_run_from_starting(tmp_path):
    held = RunLock(tmp_path)
    threading.Timer(0.05, held.release).start()
    RunLock(tmp_path).release()


def test_a_damaged_file_does_not_keep_a_run_from_resuming(tmp_path):
    quiet(run_dir=tmp_path, checkpoint=SAVES).run(Tiny())
    (tmp_path / RUN_FILE).write_text("{torn")
    with pytest.warns(LoopkitWarning, match=r"run\.json is not JSON"):
        quiet(run_dir=tmp_path, checkpoint=SAVES, resume="auto").run(Tiny())
    assert plain(tmp_path)["status"] == "finished"
    assert (tmp_path / "run.1.json").read_text() == "{torn"


def test_a_start_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Late(Tiny):
        def on_fit_start(self, run):
            (run.run_dir / "own").mkdir()
            raise RuntimeError("no")

    for fit, task, error in (
        (quiet(resume="typo"), Tiny(), CheckpointError),
        (quiet(loggers=("jsonl", "csv")), Late(), RuntimeError),
        (quiet(run_dir="deep/er/run"), Late(), RuntimeError),
    ):
        with pytest.raises(error):
            fit.run(task)
        assert list(tmp_path.iterdir()) == []


def test_a_start_that_fails_leaves_a_directory_with_files_as_it_was(tmp_path):
    quiet(run_dir=tmp_path, checkpoint=SAVES, loggers="jsonl").run(Tiny())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError):
        quiet(run_dir=tmp_path, resume=tmp_path / "typo", loggers="jsonl").run(Tiny())
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_auto_passes_over_directories_without_a_checkpoint_and_says_what_it_chose(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    quiet(resume="auto", progress="plain").run(Tiny())  # 1: saves nothing
    assert "resumed  nothing: there is no checkpoint yet" in capsys.readouterr().err
    quiet(checkpoint=SAVES).run(Tiny())  # 2
    quiet().run(Tiny())  # 3: saves nothing
    with pytest.warns(LoopkitWarning, match="the schedule"):
        result = quiet(checkpoint=SAVES, resume="auto", epochs=2, progress="plain").run(Tiny())
    assert result.run_dir == Path("runs/tiny/2")
    assert "resumed  runs/tiny/2/checkpoints/step-000000000002, at" in capsys.readouterr().err
