"""PlainProgress: progress as lines, for log files and pipes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any

from loopkit.console.banner import end_banner, start_banner
from loopkit.console.epoch_table import EpochTable
from loopkit.console.eta import SpeedEstimate, epoch_text, estimate
from loopkit.console.text import duration, number, rate
from loopkit.events import Hook

if TYPE_CHECKING:
    from loopkit.run import Run

_NEVER = float("inf")


class PlainProgress(Hook):
    """Print the start of a run, a line every few seconds, a row per evaluation, and the end.

    Rank 0 alone prints. Between lines, a step only reads the clock. If the stream cannot be
    written to any more, the printing ends and the run continues.

    Args:
        every: the least number of seconds between lines.
        file: the stream to print to; None for ``sys.stderr``, as it is at that moment.
        clock: returns seconds; for tests.
    """

    may_request = False

    def __init__(
        self,
        every: float = 10.0,
        file: IO[str] | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._every = every
        self._file = file
        self._clock = clock
        self._next = _NEVER
        self._fitting = False
        self._broken = False
        self._speed = SpeedEstimate()
        self._table = EpochTable()
        self._batches = 0

    def on_fit_start(self, run: Run) -> None:
        """Print what is trained."""
        if run.strategy.rank == 0:
            self._fitting = True
            self._restart(run)
            self._print(run, *start_banner(run))

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Print a line, if one is due."""
        now = self._clock()
        if now < self._next:
            return
        self._speed.tick(run.progress.step, now)
        self._next = now + self._every
        self._print(run, step_line(run, self._speed.rate))

    def on_eval_start(self, run: Run) -> None:
        """Start to count the batches of the evaluation."""
        self._batches = 0
        if run.strategy.rank == 0:
            self._speed.tick(run.progress.step, self._clock())
            self._next = self._clock() + self._every

    def on_eval_step_end(self, run: Run, outputs: Mapping[str, Any]) -> None:
        """Print a line, if one is due."""
        self._count(run, "evaluating")

    def on_predict_step_end(self, run: Run, outputs: Any) -> None:
        """Print a line, if one is due."""
        if self._next == _NEVER and run.strategy.rank == 0:
            self._next = self._clock() + self._every
        self._count(run, "predicting")

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Add a row to the table."""
        if run.strategy.rank == 0:
            self._print(run, *self._table.lines(run, metrics))
            self._restart(run)

    def on_fit_end(self, run: Run) -> None:
        """Print how the run ended."""
        if run.strategy.rank == 0:
            self._speed.tick(run.progress.step, self._clock())
            self._next = _NEVER
            self._print(run, step_line(run, self._speed.rate), end_banner(run))

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Print how far the run got."""
        if self._fitting:
            self._next = _NEVER
            self._print(run, step_line(run, self._speed.rate))

    def _restart(self, run: Run) -> None:
        now = self._clock()
        self._speed.restart(run.progress.step, now)
        self._next = now + self._every

    def _count(self, run: Run, activity: str) -> None:
        self._batches += 1
        now = self._clock()
        if now >= self._next:
            self._next = now + self._every
            self._print(run, f"{activity}: {self._batches:,} batches")

    def _print(self, run: Run, *lines: str) -> None:
        if self._broken:
            return
        try:
            file = self._file or sys.stderr
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
        except (OSError, ValueError):
            # Nobody reads any more: the pipe is closed, or the terminal is gone.
            self._broken = True


def step_line(run: Run, steps_per_second: float | None) -> str:
    """Return one line: steps, epoch, the last logged loss, speed, time elapsed and time left."""
    eta = estimate(run, steps_per_second)
    total = "" if eta.total is None else f"/{eta.total:,}"
    share = "" if eta.done is None else f" ({eta.done:.0%})"
    parts = [f"step {run.progress.step:,}{total}{share}", f"epoch {epoch_text(run)}"]
    parts += [f"{name} {number(value)}" for name, value in latest(run.metrics).items()]
    parts += [rate(steps_per_second), f"{duration(run.seconds())} elapsed"]
    if eta.left is not None:
        parts.append(f"{duration(eta.left)} left")
    return " | ".join(parts)


def latest(metrics: Mapping[str, float], *, evaluated: bool = False) -> dict[str, float]:
    """Return the training loss and the learning rate, or the metrics of the last evaluation."""
    if evaluated:
        hidden = ("eval/runtime", "eval/samples_per_second")
        return {
            name: value
            for name, value in metrics.items()
            if name.startswith("eval/") and name not in hidden
        }
    shown = {"train/loss": "loss", "lr": "lr"}
    return {label: metrics[name] for name, label in shown.items() if name in metrics}
