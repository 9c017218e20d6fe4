"""Resume from every step is bit-identical to never having stopped, the loss log included."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from loopkit import Checkpoint, Loader
from loopkit.errors import LoopkitWarning
from loopkit.loggers.jsonl import read_rows
from tests.support import Noisy, Recorder, Tiny, digest, points, quiet

EPOCHS, STEPS = (
    3,
    12,
)  # 60 samples in micro-batches of 8, two of them a step: 4 steps an epoch, the last one shorter


class Stream(IterableDataset):
    """Points drawn from the global stream, with no state of its own."""

    def __iter__(self):
        for index in range(60):
            x, y = points(60)[index]
            yield x + 0.1 * torch.randn(8), y


class Stateful:
    """An iterable of batches that can say where it is."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self):
        data = points(64)
        start, self.at = self.at, 0
        for number in range(start, 8):
            self.at = (number + 1) % 8
            yield data[8 * number : 8 * number + 8]

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class Fed(Tiny):
    """Tiny on one of several kinds of data."""

    def __init__(self, kind: str) -> None:
        super().__init__(noisy=True)
        self.kind = kind

    def train_data(self) -> Any:
        return {
            "dataset": lambda: Noisy(60),
            "workers": lambda: Loader(Noisy(60), num_workers=2),
            "dataloader": lambda: DataLoader(Noisy(60), 8, shuffle=True),
            "iterable": Stream,
            "stateful": Stateful,
        }[self.kind]()


def run(
    kind: str, run_dir: Path, stop_at: int | None = None, **options: Any
) -> tuple[str, str, list, list]:
    """Run or resume; return the digest of all state, the losses, and the rows without times."""
    task, recorder, state = Fed(kind), Recorder(), {}
    fit = quiet(
        epochs=EPOCHS,
        steps=STEPS,
        batch_size=8,
        accumulate=2,
        clip_norm=1.0,
        run_dir=run_dir,
        hooks=[recorder],
        eval_every="3 steps",
        log_every="5 steps",
        resume="auto",
        loggers="jsonl",
        **options,
    )
    if stop_at is not None:
        fit.on("step_end", lambda r, out: r.stop("test") if r.progress.step == stop_at else None)

    @fit.on("fit_end")
    def keep(r, *_):
        tensors, plain = r.strategy.optimizer_state()
        state["optimizer"] = digest(tensors) + repr(plain)
        state["progress"] = repr(
            {k: v for k, v in r.progress.state_dict().items() if k != "seconds"}
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopkitWarning)
        result = fit.run(task)
    timed = ("time", "eval/runtime", "eval/samples_per_second")
    rows = [
        {k: v for k, v in row.items() if k not in timed}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]
    assert [{k: v for k, v in row.items() if k not in timed} for row in result.history] == rows
    return digest(task.state_dict()) + state["optimizer"], state["progress"], recorder.losses, rows


CASES = [("dataset", "counter"), ("workers", "counter"), ("dataloader", "counter"), ("iterable", "counter"),
         ("stateful", "counter"), ("dataset", "stream"), ("workers", "stream"), ("dataloader", "stream"),
         ("iterable", "stream")]  # fmt: skip


@pytest.mark.parametrize(("kind", "rng"), CASES)
def test_resume_from_every_step_is_identical(kind, rng, tmp_path):
    save = Checkpoint(every="1000 steps", background=False)
    whole = run(kind, tmp_path / "whole", rng=rng, checkpoint=save)
    assert len(whole[2]) == STEPS
    # Each run with workers starts six processes: stops in an epoch, at its end and after it suffice.
    for stop in range(1, STEPS) if kind != "workers" else (3, 4, 5, 11):
        first = run(kind, tmp_path / str(stop), stop, rng=rng, checkpoint=save)
        rest = run(kind, tmp_path / str(stop), rng=rng, checkpoint=save)
        assert first[2] + rest[2] == whole[2], f"the losses differ after a stop at step {stop}"
        assert rest[:2] == whole[:2], f"the state differs after a stop at step {stop}"
        assert rest[3] == whole[3], f"the log differs after a stop at step {stop}"


def test_workers_do_not_change_the_numbers(tmp_path):
    runs = [
        run(kind, tmp_path / kind, checkpoint=False)
        for kind in ("dataset", "workers", "dataloader")
    ]
    assert runs[0] == runs[1] == runs[2]


def test_the_fingerprint_can_tell_runs_apart(tmp_path):
    one = run("dataset", tmp_path / "one", checkpoint=False)
    other = run("dataset", tmp_path / "other", checkpoint=False, seed=1)
    assert one[0] != other[0]
    assert one[2] != other[2]
