"""Running a task whole, and with a stop and a resume in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopkit import Checkpoint, Hook
from loopkit.loggers.jsonl import read_rows
from tests.support import Recorder, Tiny, digest, quiet

TIMED = ("time", "eval/runtime", "eval/samples_per_second")


class Normed(Tiny):
    """Tiny with BatchNorm, and without dropout unless asked for."""

    def __init__(self, count: int = 60, lr: float = 1e-2, dropout: float = 0.0) -> None:
        super().__init__(count, lr, dropout)
        self.net = nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 3)
        )


def go(
    make: Callable[[], Hook],
    run_dir: Path,
    stop_at: int | None = None,
    task: type[Tiny] = Tiny,
    **options: Any,
) -> dict[str, Any]:
    """Run or resume with a fresh hook; everything that must be the same in a run never stopped."""
    model, recorder, hook, kept = task(), Recorder(), make(), {}
    options = {
        "epochs": 3,
        "batch_size": 8,
        "eval_every": "3 steps",
        "log_every": "5 steps",
        **options,
    }
    fit = quiet(
        run_dir=run_dir,
        hooks=[recorder, hook],
        resume="auto",
        loggers="jsonl",
        checkpoint=Checkpoint(every="1000 steps"),
        **options,
    )
    if stop_at is not None:
        fit.on(
            "step_end", lambda run, out: run.stop("test") if run.progress.step == stop_at else None
        )

    @fit.on("fit_end")
    def keep(run, *_):
        tensors, plain = run.strategy.optimizer_state()
        kept["optimizer"] = digest(tensors) + repr(plain)
        state = hook.state_dict()
        averages = state.pop("averages", {})
        kept["hook"] = repr(state) + digest(averages)

    result = fit.run(model)
    rows = [
        {k: v for k, v in row.items() if k not in TIMED}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]
    return {
        "weights": digest(model.state_dict()),
        **kept,
        "losses": recorder.losses,
        "rows": rows,
        "status": result.status,
    }


def check_resume(
    make: Callable[[], Hook], folder: Path, stops: tuple[int, ...], **options: Any
) -> dict[str, Any]:
    """Compare a whole run with one stopped and resumed at each of ``stops``; returns the whole one."""
    whole = go(make, folder / "whole", **options)
    for stop in stops:
        first = go(make, folder / str(stop), stop, **options)
        rest = go(make, folder / str(stop), **options)
        assert first["losses"] + rest["losses"] == whole["losses"], f"losses after a stop at {stop}"
        for part in ("weights", "optimizer", "hook", "rows"):
            assert rest[part] == whole[part], f"{part} after a stop at step {stop}"
    return whole


def weights(task: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.named_parameters()}
