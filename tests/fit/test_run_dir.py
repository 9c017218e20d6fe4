"""The run directory: never overwritten silently, used by one run at a time, resumed only when
asked.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from loopkit import Checkpoint, Hook
from loopkit.checkpoint import RunLock
from loopkit.errors import (
    CheckpointError,
    DiskFullError,
    LoopkitWarning,
    NoValidCheckpointError,
    RunDirError,
)
from tests import fork_server
from tests.support import Tiny, digest, quiet

SAVES = Checkpoint(every="5 steps", background=False)


def test_the_default_is_the_next_number_under_the_task(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert quiet(checkpoint=True).run(Tiny()).run_dir == Path("runs/tiny/1")
    assert quiet(checkpoint=True).run(Tiny()).run_dir == Path("runs/tiny/2")
    with pytest.warns(LoopkitWarning, match="the schedule"):
        again = quiet(checkpoint=True, resume="auto", epochs=2).run(Tiny())
    assert again.run_dir == Path("runs/tiny/2")
    assert again.step == 4


def test_a_directory_with_checkpoints_and_no_resume_is_refused(tmp_path):
    quiet(run_dir=tmp_path, checkpoint=SAVES).run(Tiny())
    with pytest.raises(
        RunDirError, match=r"holds 1 checkpoint\(s\), up to step-000000000002: pass resume='auto'"
    ):
        quiet(run_dir=tmp_path, checkpoint=SAVES).run(Tiny())


def test_two_runs_in_one_directory_are_refused_naming_the_other(tmp_path):
    with RunLock(tmp_path, "first"), pytest.raises(RunDirError, match=f"{os.getpid()}"):
        quiet(run_dir=tmp_path).run(Tiny())
    quiet(run_dir=tmp_path).run(Tiny())


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/proc/sys").exists(), reason="needs a place root cannot write"
)
def test_a_directory_that_cannot_be_written_is_refused_before_step_1():
    steps = []
    fit = quiet(run_dir="/proc/sys/loopkit-run")
    fit.on("step_end", lambda run, out: steps.append(1))
    with pytest.raises(RunDirError, match="/proc/sys/loopkit-run"):
        fit.run(Tiny())
    assert not steps


def test_a_full_disk_names_the_file_and_leaves_the_last_valid_checkpoint(tmp_path):
    code = f"""
import resource, sys
from loopkit import Checkpoint
from tests import fork_server
from tests.support import Tiny, quiet
from loopkit.errors import DiskFullError
fit = quiet(run_dir={str(tmp_path)!r}, epochs=5, batch_size=10, checkpoint=Checkpoint(every=4, background=False))
@fit.on("step_end")
def fill(run, out):
    if run.progress.step == 6:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    fit.run(Tiny())
except DiskFullError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    done = fork_server.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == DiskFullError.exit_code, done.stderr
    assert "safetensors" in done.stdout
    names = sorted(os.listdir(tmp_path / "checkpoints"))
    assert names == ["latest", "step-000000000004"]
    assert (
        quiet(run_dir=tmp_path, resume="auto", epochs=5, batch_size=10, checkpoint=SAVES)
        .run(Tiny())
        .step
        == 30
    )


def test_resume_from_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such checkpoint or run directory"):
        quiet(run_dir=tmp_path, resume=tmp_path / "nothing").run(Tiny())
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    with pytest.raises(NoValidCheckpointError, match="holds no checkpoint"):
        quiet(run_dir=tmp_path / "new", resume=tmp_path / "old").run(Tiny())


def test_an_export_is_no_checkpoint(tmp_path):
    saved = quiet(run_dir=tmp_path / "run", steps=2, checkpoint=True).run(Tiny())
    folder = saved.export(tmp_path / "export")
    for load in (Tiny.load, lambda path: quiet(resume=path).run(Tiny())):
        with pytest.raises(CheckpointError, match=r"is an export.*load_file\('.*model.safetensors"):
            load(folder)


def test_resume_from_another_run_continues_in_a_new_directory(tmp_path):
    whole, first = Tiny(), Tiny()
    quiet(epochs=4).run(whole)
    quiet(epochs=2, run_dir=tmp_path / "a", checkpoint=SAVES, steps=2).run(
        first
    )  # stops early, on another schedule
    with pytest.warns(LoopkitWarning, match="the schedule"):
        result = quiet(
            epochs=4, run_dir=tmp_path / "b", resume=tmp_path / "a", checkpoint=SAVES
        ).run(Tiny())
    assert result.step == 8
    assert result.checkpoint.parent.parent == tmp_path / "b"


def test_weights_alone_cannot_be_resumed_but_loaded(tmp_path):
    task = Tiny(lr=0.05)
    quiet(run_dir=tmp_path, checkpoint=Checkpoint(weights_only=True)).run(task)
    with pytest.raises(CheckpointError, match=r"weights alone.*Tiny.load"):
        quiet(run_dir=tmp_path / "b", resume=next((tmp_path / "checkpoints").glob("step-*"))).run(
            Tiny()
        )
    loaded = Tiny.load(tmp_path)
    assert digest(loaded.state_dict()) == digest(task.state_dict())
    assert (
        loaded.hparams == task.hparams == {"count": 60, "lr": 0.05, "dropout": 0.2, "noisy": False}
    )


def test_another_model_is_refused_before_anything_changes(tmp_path):
    from torch import nn

    quiet(run_dir=tmp_path, checkpoint=SAVES).run(Tiny())

    class Wider(Tiny):
        def __init__(self):
            super().__init__()
            self.net[0] = nn.Linear(8, 16, bias=False)
            self.net[3] = nn.Linear(16, 4)

    task = Wider()
    before = digest(task.state_dict())
    with pytest.raises(
        CheckpointError, match=r"net.0.bias is not in the task; .*net.3.weight has shape \(3, 16\)"
    ):
        quiet(run_dir=tmp_path, resume="auto", checkpoint=SAVES).run(task)
    assert digest(task.state_dict()) == before


def test_corruption_is_caught_and_the_previous_checkpoint_used(tmp_path):
    whole = Tiny()
    quiet(epochs=4, batch_size=10).run(whole)
    quiet(epochs=4, batch_size=10, run_dir=tmp_path, checkpoint=SAVES, hooks=[StopAt(13)]).run(
        Tiny()
    )
    newest = sorted((tmp_path / "checkpoints").glob("step-*"))[-1]
    data = bytearray((newest / "model.safetensors").read_bytes())
    data[-5] ^= 1
    (newest / "model.safetensors").write_bytes(bytes(data))
    task = Tiny()
    with pytest.warns(UserWarning, match="model.safetensors"):
        quiet(epochs=4, batch_size=10, run_dir=tmp_path, checkpoint=SAVES, resume="auto").run(task)
    assert digest(task.state_dict()) == digest(whole.state_dict())
    assert list((tmp_path / "checkpoints").glob("*.corrupt-1"))


class StopAt(Hook):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, run, out):
        if run.progress.step == self.step:
            run.stop("test")


def test_retention_keeps_the_newest_and_the_best(tmp_path):
    class Rigged(Tiny):
        """Best at step 6, whatever it learned."""

        def eval_step(self, batch):
            return {"loss": super().eval_step(batch)["loss"] * 0 + abs(self.step - 6)}

        def on_step_end(self, run, out):
            self.step = run.progress.step

    result = quiet(
        epochs=10,
        run_dir=tmp_path,
        eval_every=3,
        checkpoint=Checkpoint(every=4, keep=2, best="eval/loss:min", background=False),
    ).run(Rigged())
    assert result.best["step"] == 6
    assert sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step-*")) == [6, 16, 20]
    assert result.best["checkpoint"].name == "step-000000000006"
    manifest = json.loads(
        (tmp_path / "checkpoints" / "step-000000000006" / "MANIFEST.json").read_text()
    )
    assert "eval/loss" in json.dumps(manifest)


def test_a_new_best_where_a_checkpoint_is_due_anyway_is_saved_once(tmp_path):
    class Better(Tiny):
        def eval_step(self, batch):
            return {"loss": super().eval_step(batch)["loss"] * 0 - self.step}

        def on_step_end(self, run, out):
            self.step = run.progress.step

    quiet(
        epochs=3,
        run_dir=tmp_path,
        checkpoint=Checkpoint(every="1 epoch", keep=None, best="eval/loss:min"),
    ).run(Better())
    assert sorted(int(p.name[5:]) for p in (tmp_path / "checkpoints").glob("step-*")) == [2, 4, 6]


def test_a_first_evaluation_that_is_nan_is_not_the_best(tmp_path):
    class Bad(Tiny):
        def eval_step(self, batch):
            outputs = super().eval_step(batch)
            return (
                outputs if self.evaluated else {**outputs, "loss": outputs["loss"] * float("nan")}
            )

    task = Bad()
    task.evaluated = 0
    fit = quiet(
        batch_size=10,
        eval_every="2 steps",
        run_dir=tmp_path,
        checkpoint=Checkpoint(best="eval/loss:min", every="never"),
    )
    fit.on("eval_end", lambda run, metrics: setattr(task, "evaluated", task.evaluated + 1))
    with pytest.warns(LoopkitWarning, match="eval/loss is NaN at step 2: NaN is never the best"):
        result = fit.run(task)
    losses = {row["step"]: row["eval/loss"] for row in result.history if "eval/loss" in row}
    assert losses[2] != losses[2]
    assert (
        result.best["step"] == min((loss, step) for step, loss in losses.items() if loss == loss)[1]
    )
    assert result.best["checkpoint"] is not None


def test_load_best_gives_the_task_the_best_weights(tmp_path):
    weights = {}

    class Rigged(Tiny):
        def eval_step(self, batch):
            return {"loss": super().eval_step(batch)["loss"] * 0 + abs(self.step - 4)}

        def on_step_end(self, run, out):
            self.step = run.progress.step
            weights[self.step] = digest(self.state_dict())

    task = Rigged()
    quiet(
        epochs=4,
        run_dir=tmp_path,
        eval_every=2,
        checkpoint=Checkpoint(best="eval/loss:min", load_best=True),
    ).run(task)
    assert digest(task.state_dict()) == weights[4] != weights[8]


def test_dry_run_does_everything_once_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task, seen = Tiny(), []
    before = digest(task.state_dict())
    fit = quiet(dry_run=True, epochs=50)
    for event in ("step_end", "eval_end", "save", "load"):
        fit.on(event, lambda *_, event=event: seen.append(event))
    fit.run(task)
    assert seen.count("step_end") == 2
    assert {"eval_end", "save", "load"} <= set(seen)
    assert digest(task.state_dict()) == before
    assert not os.listdir(tmp_path)


def test_going_on_from_an_older_checkpoint_leaves_the_later_ones_behind(tmp_path):
    quiet(epochs=4, batch_size=10, run_dir=tmp_path, checkpoint=SAVES).run(Tiny())
    older = tmp_path / "checkpoints" / "step-000000000015"
    quiet(
        epochs=4,
        batch_size=10,
        run_dir=tmp_path,
        checkpoint=SAVES,
        resume=older,
        hooks=[StopAt(17)],
    ).run(Tiny())
    task, steps = Tiny(), []
    fit = quiet(epochs=4, batch_size=10, run_dir=tmp_path, checkpoint=SAVES, resume="auto")
    fit.on("step_end", lambda run, out: steps.append(run.progress.step))
    fit.run(task)
    assert steps[0] == 18
    whole = Tiny()
    quiet(epochs=4, batch_size=10).run(whole)
    assert digest(task.state_dict()) == digest(whole.state_dict())


def test_auto_resume_of_weights_alone_is_refused(tmp_path):
    quiet(run_dir=tmp_path, checkpoint=Checkpoint(weights_only=True)).run(Tiny())
    with pytest.raises(CheckpointError, match="weights alone, which cannot be resumed"):
        quiet(run_dir=tmp_path, checkpoint=Checkpoint(weights_only=True), resume="auto").run(Tiny())


def test_the_best_is_known_and_loaded_after_a_resume_too(tmp_path):
    class Rigged(Tiny):
        def eval_step(self, batch):
            return {"loss": super().eval_step(batch)["loss"] * 0 + abs(self.step - 4)}

        def on_step_end(self, run, out):
            self.step = run.progress.step

    settings = Checkpoint(best="eval/loss:min", load_best=True, keep=1)
    options = {"epochs": 4, "run_dir": tmp_path, "eval_every": 2, "checkpoint": settings}
    quiet(hooks=[StopAt(6)], **options).run(Rigged())
    task = Rigged()
    result = quiet(resume="auto", **options).run(task)
    assert result.best["checkpoint"] == tmp_path / "checkpoints" / "step-000000000004"
    assert digest(task.state_dict()) == digest(Rigged.load(result.best["checkpoint"]).state_dict())
