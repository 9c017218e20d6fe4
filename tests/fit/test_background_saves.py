"""A background save is reported before the next one starts, whose retention may delete it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from loopkit import Checkpoint, Hook
from loopkit.checkpoint import BackgroundWriter
from tests.support import Tiny, quiet


def test_on_save_finds_its_checkpoint_however_slow_the_writer_is(tmp_path, monkeypatch):
    awaited = threading.Event()
    run, join = BackgroundWriter._run, BackgroundWriter._join

    def slow_run(self: BackgroundWriter, *args: Any) -> None:
        awaited.wait(60)  # a save ends when the training thread waits for it, and not before
        run(self, *args)

    def waiting_join(self: BackgroundWriter) -> None:
        awaited.set()
        join(self)
        awaited.clear()

    monkeypatch.setattr(BackgroundWriter, "_run", slow_run)
    monkeypatch.setattr(BackgroundWriter, "_join", waiting_join)
    seen: list[tuple[str, bool]] = []
    unfinished: list[bool] = []

    class Uploads(Hook):
        def on_save(self, run: Any, path: Path) -> None:
            seen.append((path.name, path.is_dir()))
            unfinished.append(run.checkpointer._background.busy)

    quiet(
        epochs=1,
        batch_size=8,
        run_dir=tmp_path,
        hooks=[Uploads()],
        eval_every="never",
        checkpoint=Checkpoint(every="1 steps", keep=1),
    ).run(Tiny(count=40))
    assert len(seen) == 5
    assert all(exists for _, exists in seen), seen
    assert not any(unfinished), "no save is in flight while listeners read the last one"


def test_on_save_comes_soon_after_the_write_and_not_at_the_next_save(tmp_path):
    seen: list[tuple[str, int]] = []

    class Uploads(Hook):
        def on_save(self, run: Any, path: Path) -> None:
            seen.append((path.name, run.progress.step))

    fit = quiet(
        steps=40, batch_size=8, run_dir=tmp_path, hooks=[Uploads()], eval_every="never",
        log_every="never", checkpoint=Checkpoint(every="20 steps"),
    )  # fmt: skip

    def written(run: Any, *_: Any) -> None:
        if run.progress.step == 21:  # the thread may be slower than a step
            run.checkpointer._background._thread.join()

    fit.on("step_end", written)
    fit.run(Tiny(count=400))
    names = [name for name, _ in seen]
    assert names == ["step-000000000020", "step-000000000040"]
    assert 20 <= seen[0][1] <= 22


def test_a_slow_save_is_looked_for_ever_more_rarely(tmp_path, monkeypatch):
    over = threading.Event()
    run_save, polled = BackgroundWriter._run, []
    poll = BackgroundWriter.poll

    def slow(self: BackgroundWriter, *args: Any) -> None:
        over.wait(60)
        run_save(self, *args)

    def counting(self: BackgroundWriter) -> list[Path]:
        polled.append(1)
        return poll(self)

    monkeypatch.setattr(BackgroundWriter, "_run", slow)
    monkeypatch.setattr(BackgroundWriter, "poll", counting)
    fit = quiet(steps=200, batch_size=4, run_dir=tmp_path, eval_every="never", log_every="never",
                checkpoint=Checkpoint(every="500 steps"))  # fmt: skip
    fit.on("step_start", lambda run, _: run.request("save") if run.progress.step == 10 else None)
    fit.on("step_end", lambda run, _: over.set() if run.progress.step == 150 else None)
    fit.run(Tiny(count=800))
    assert len(polled) < 20
