"""Result: what a run gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopkit.checkpoint.tools import export_model
from loopkit.console.summary import result_summary
from loopkit.errors import CheckpointError
from loopkit.run import Progress, Run


@dataclass
class Result:
    """The outcome of ``Fit.run``.

    Attributes:
        status: "finished", "stopped" (a hook or limit asked for it) or "interrupted" (a signal).
        reason: what stopped or interrupted it; empty otherwise.
        step, epoch: completed optimizer steps and passes over the data.
        metrics: the latest value of everything logged.
        best: of the best evaluation: metric, value, step, checkpoint; empty without
            ``Checkpoint(best=)``.
        history: every logged row, ``{"step": ..., "train/loss": ...}``, earlier attempts of a
            resumed run included.
        checkpoint: the newest checkpoint; None when nothing was saved.
        run_dir: the run's directory; None when it has none.
        timings: microseconds per step on the host by part: "data", "compute" (forward and
            backward), "update", "framework" (everything outside the user's code, the data and the
            optimizer) and "step", their sum.
    """

    status: str
    reason: str
    step: int
    epoch: int
    metrics: dict[str, float]
    best: dict[str, Any]
    history: list[dict[str, Any]]
    checkpoint: Path | None
    run_dir: Path | None
    timings: dict[str, float]
    progress: Progress = field(repr=False, default_factory=Progress)

    @classmethod
    def of(cls, run: Run) -> Result:
        """The result of a run that is over."""
        record, checkpointer = run.record, run.checkpointer
        return cls(
            status=run.outcome.status,
            reason=run.outcome.reason,
            step=run.progress.step,
            epoch=run.progress.epoch,
            metrics=dict(record.metrics),
            best=dict(record.best),
            history=list(record.history),
            checkpoint=None if checkpointer is None else checkpointer.newest,
            run_dir=run.run_dir,
            timings=record.timings.per_step(),
            progress=run.progress,
        )

    def summary(self) -> str:
        """What happened, as text: status, metrics, where the files are, where the time of a step
        went.
        """
        return result_summary(
            self.status,
            self.reason,
            self.progress,
            self.metrics,
            self.best,
            self.timings,
            self.run_dir,
            self.checkpoint,
        )

    def export(self, directory: str | Path) -> Path:
        """Write the newest checkpoint's weights as one plain ``model.safetensors`` into
        ``directory``.

        Raises:
            CheckpointError: nothing was saved, it cannot be trusted, or the directory is not empty.
        """
        if self.checkpoint is None:
            raise CheckpointError(
                "this run saved no checkpoint to export: run with checkpoint=True"
            )
        return export_model(self.checkpoint, Path(directory))
