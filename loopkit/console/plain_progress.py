"""PlainProgress: progress as lines, for log files and pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any

from loopkit.console.display import Display
from loopkit.console.eta import epoch_text, estimate
from loopkit.console.latest_values import shown_values
from loopkit.console.text import duration, rate

if TYPE_CHECKING:
    from loopkit.run import Run

_LEFT_OUT = ("memory", "grad_norm", "skipped_steps")


class PlainProgress(Display):
    """Print the start of a run, a line every few seconds, a row per evaluation, and the end.

    On a terminal, the table of evaluations keeps to its width.

    Args:
        every: the least number of seconds between lines.
        file: the stream to print to; None for ``sys.stderr``, as it is at that moment.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        every: float = 10.0,
        file: IO[str] | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        super().__init__(every, clock)
        self._file = file

    def on_predict_step_end(self, run: Run, outputs: Any) -> None:
        """Print a line, if one is due."""
        if run.strategy.rank == 0:
            self._run, self._activity = run, "predicting"
            if self._next == float("inf"):
                self._next = self._clock() + self._every
            self.on_eval_step_end(run, outputs)

    def doing(self, text: str) -> None:
        """Print what is done at the moment, if somebody waits for the end of the run."""
        if text and self._run is not None and self._run.outcome.status == "interrupted":
            self.say(text)

    def _print(self, *lines: str) -> None:
        file = self._file or sys.stderr
        file.write("".join(f"{line}\n" for line in lines))
        file.flush()

    def _frame(self, run: Run) -> None:
        if self._activity in ("evaluating", "predicting"):
            if self._batches:
                self._print(f"{self._activity}: {self._batches:,} batches")
            return
        self._print(step_line(run, self._speed.rate, self._tokens.rate))

    def _columns(self) -> int | None:
        file = self._file or sys.stderr
        return os.get_terminal_size(file.fileno()).columns or None if file.isatty() else None


def step_line(run: Run, per_second: float | None, tokens_per_second: float | None = None) -> str:
    """Return one line: steps, epoch, training values, speed, time elapsed and time left."""
    eta = estimate(run, per_second)
    total = "" if eta.total is None else f"/{eta.total:,}"
    share = "" if eta.done is None else f" ({eta.done:.0%})"
    parts = [f"step {run.progress.step:,}{total}{share}", f"epoch {epoch_text(run)}"]
    parts += [
        f"{name} {text}"
        for name, text in shown_values(run, tokens_per_second).items()
        if name not in _LEFT_OUT and not name.startswith("eval/")
    ]
    parts += [rate(per_second), f"{duration(run.seconds())} elapsed"]
    if eta.left is not None:
        parts.append(f"{duration(eta.left)} left")
    return " | ".join(parts)
