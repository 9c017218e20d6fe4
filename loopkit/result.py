"""Result: the outcome of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

from loopkit.checkpoint.tools import export_model
from loopkit.console.next_lines import next_lines
from loopkit.console.summary import result_summary
from loopkit.devices import peak_memory
from loopkit.distributed.once import once
from loopkit.errors import CheckpointError
from loopkit.run import Progress, Run

_PATIENCE = timedelta(minutes=30)


@dataclass
class Result:
    """The outcome of ``Fit.run``.

    Attributes:
        status: "finished", "stopped" (by a hook or a limit) or "interrupted" (by a signal).
        reason: the reason of a stop or an interruption; empty otherwise.
        step: completed optimizer steps.
        epoch: completed passes over the data.
        metrics: the latest value of every name that was logged.
        best: "metric", "value", "step" and "checkpoint" of the best evaluation; empty without
            ``Checkpoint(best=)``.
        history: every logged row, such as ``{"step": 50, "train/loss": 0.3}``, with those of
            earlier attempts of a resumed run.
        checkpoint: the newest checkpoint; None if nothing was saved.
        run_dir: the run's directory, on this machine; None if it has none.
        url: the run's place in a store; None if ``run_dir`` was no URL. What is on this machine is
            then a copy, with the newest and the best checkpoint.
        timings: microseconds per step on the host by part: "data", "compute" (forward and
            backward), "update", "framework" (everything outside the user's code, the data and the
            optimizer) and "step", their sum.
        progress: all counters of the run.
        peak_memory: the most bytes that torch held on this rank's GPU, or that the process held in
            memory on the CPU; None if that is not known.
        loaded: the checkpoint whose weights the task has after ``Checkpoint(load_best=True)``; None
            if it has those of the last step.
    """

    status: str
    reason: str
    step: int
    epoch: int
    metrics: dict[str, float]
    best: dict[str, Any]
    history: list[dict[str, Any]] = field(repr=False)
    checkpoint: Path | None
    run_dir: Path | None
    timings: dict[str, float] = field(repr=False)
    progress: Progress = field(repr=False, default_factory=Progress)
    peak_memory: int | None = field(repr=False, default=None)
    loaded: Path | None = field(repr=False, default=None)
    url: str | None = None
    _next: dict[str, str] = field(repr=False, default_factory=dict)
    _ranks: int = field(repr=False, default=1)

    @classmethod
    def of(cls, run: Run) -> Result:
        """Return the result of a run that has ended."""
        record, checkpointer = run.record, run.checkpointer
        loads_best = checkpointer is not None and checkpointer.settings.load_best
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
            url=run.options.url,
            timings=record.timings.per_step(),
            progress=run.progress,
            peak_memory=peak_memory(run.strategy.device),
            _next=next_lines(run),
            loaded=record.best.get("checkpoint") if loads_best else None,
            _ranks=run.strategy.world_size,
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: status, metrics, curves, and the next lines to type."""
        from loopkit.console.html import result_html  # a notebook alone needs it

        return result_html(self)

    def summary(self) -> str:
        """Return the outcome as text: status, times, metrics, the best one, and what to type next."""
        return result_summary(self)

    @property
    def next_lines(self) -> dict[str, str]:
        """Lines to type next: "evaluate", "predict" and "load". Empty if nothing was saved."""
        return dict(self._next)

    def export(self, directory: str | Path) -> Path:
        """Write weights as ``model.safetensors`` into a new directory.

        These are the weights of the newest checkpoint, or those of the best one if the run loaded
        them (``Checkpoint(load_best=True)``). On several ranks, rank 0 writes, and every rank that
        calls this waits for it.

        Returns:
            The directory.

        Raises:
            CheckpointError: nothing was saved, or the checkpoint cannot be trusted.
            OptionError: the directory is not empty.
            HungError: rank 0 does not call this.
        """
        checkpoint = self.loaded or self.checkpoint
        if checkpoint is None:
            raise CheckpointError(
                "this run saved no checkpoint to export: run with checkpoint=True"
            )

        def write() -> str:
            return str(export_model(checkpoint, Path(directory)))

        if self._ranks == 1:
            return Path(write())
        return Path(once(f"export({str(directory)!r})", write, _PATIENCE))
