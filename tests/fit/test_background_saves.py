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
