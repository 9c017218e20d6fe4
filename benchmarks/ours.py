"""loopkit as a contestant."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from benchmarks.job import CLIP, LOG_EVERY, LR, Job
from loopkit import Fit, Hook, Task
from loopkit.optim import AdamW, cosine


class Classifier(Task):
    """The job as a Task."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.model = job, job.model

    def train_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.model(**batch)

    def optimizers(self) -> Any:
        return AdamW(
            lr=LR, weight_decay=0.01, no_decay=(), schedule=cosine() if self.job.full else None
        )

    def train_data(self) -> Any:
        return self.job.data


class Counting(Hook):
    """Tells the job of each step."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def on_step_end(self, run: Any, step: Any) -> None:
        self.job.hook()


def loopkit(job: Job) -> None:
    """Run Fit with its defaults: on_nan="raise" and rng="counter" in both settings."""
    if job.full:
        options: dict[str, Any] = {"clip_norm": CLIP, "log_every": LOG_EVERY}
    else:
        options = {"loggers": None, "checkpoint": False, "log_every": "never"}
        options |= {"log_every": LOG_EVERY} if job.bar else {"progress": False}
    hooks = [Counting(job) for _ in range(job.hooks)]
    Fit(run_dir=job.folder, hooks=hooks, **options).run(Classifier(job))
