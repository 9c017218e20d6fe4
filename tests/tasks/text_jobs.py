"""Runs of the tasks on texts, for other processes: on two ranks, or in a process that is killed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from loopkit import Checkpoint, Task
from tests.contract.jobs import make
from tests.support import quiet


def made(name: str) -> Task:
    """Return a small task on its sample, always the same one."""
    from tasks.qa import QuestionAnswering
    from tasks.summarize import Summarize

    torch.manual_seed(0)
    if name == "qa":
        return QuestionAnswering(width=16, layers=1, lr=1e-2)
    return Summarize(kind=name, width=16, layers=1, max_new_tokens=12, num_beams=2, lr=1e-2)


def train(name: str, run_dir: Path, kill_at: int | None = None) -> Task:
    """Train 6 steps, or continue the run in ``run_dir``; the process is killed after ``kill_at``."""
    task = made(name)
    fit = quiet(
        steps=6,
        batch_size=8,
        clip_norm=1.0,
        eval_every=4,
        limit_eval=1,
        run_dir=run_dir,
        resume="auto",
        checkpoint=Checkpoint(every="2 steps"),
    )

    def kill(run: Any, out: Any) -> None:
        if run.progress.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    fit.on("step_end", kill)
    fit.run(task)
    return task


def measured(name: str, strategy: str, **options: Any) -> dict[str, float]:
    """Train 12 steps of 16 samples; return what the evaluation measures."""
    task = made(name)
    fit = quiet(steps=12, strategy=make(strategy), accelerator="cpu", eval_every=12, **options)
    return fit.run(task).metrics


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
