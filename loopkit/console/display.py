"""Display: what all displays of progress share. They differ in how they draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from loopkit.console.banner import end_banner, start_banner
from loopkit.console.epoch_table import EpochTable
from loopkit.console.eta import SpeedEstimate
from loopkit.console.next_lines import where_it_is_left
from loopkit.events import Announcer, Hook

if TYPE_CHECKING:
    from loopkit.run import Run

_NEVER = float("inf")
# Drawing gets at most this share of the time, however slow the terminal is.
_SHARE = 0.002


class Display(Hook, Announcer):
    """Show the start of a run, its progress now and then, a row per evaluation, and its end.

    Rank 0 alone shows anything. Between two drawings, a step only reads the clock. Drawings become
    rarer where they are slow, so that they take at most 0.2 % of the time.

    Args:
        every: the least number of seconds between drawings.
        clock: returns seconds; for tests.
    """

    may_request = False

    def __init__(self, every: float, clock: Callable[[], float] = perf_counter) -> None:
        self._every = every
        self._clock = clock
        self._next = _NEVER
        self._run: Run | None = None
        self._speed = SpeedEstimate()
        self._tokens = SpeedEstimate()
        self._table: EpochTable | None = None
        self._batches = 0
        self._eval_total: int | None = None
        self._activity = ""
        self._busy = False
        self._waiting: list[str] = []
        self._gone = False

    # What a display draws. None of these is called on another rank than 0.

    def _print(self, *lines: str) -> None:
        """Show lines that stay."""
        raise NotImplementedError

    def _frame(self, run: Run) -> None:
        """Show the progress of this moment."""

    def _open(self, run: Run) -> None:
        """Begin to show progress."""

    def _close(self) -> None:
        """End showing progress; the last state stays."""

    def _columns(self) -> int | None:
        """Return the cells of a line; None for no limit."""
        return None

    # What happens in the run.

    def on_fit_start(self, run: Run) -> None:
        """Show what is trained."""
        if run.strategy.rank == 0:
            self._run = run
            self._restart(run)
            self._shown(lambda: self._print(*start_banner(run)))
            self._shown(lambda: self._open(run))

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Draw, if it is due."""
        now = self._clock()
        if now >= self._next:
            self._tick(run, now)
            self._draw(run, now)

    def on_eval_start(self, run: Run) -> None:
        """Show the progress of an evaluation."""
        if self._run is not None:
            now = self._clock()
            self._tick(run, now)
            counts = [source.batches_per_epoch() for source in run.eval_data.values()]
            known = [count for count in counts if count is not None]
            self._eval_total = sum(known) or None if len(known) == len(counts) else None
            self._batches, self._activity = 0, "evaluating"
            self._draw(run, now)

    def on_eval_step_end(self, run: Run, outputs: Mapping[str, Any]) -> None:
        """Draw, if it is due."""
        self._batches += 1
        now = self._clock()
        if now >= self._next:
            self._draw(run, now)

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Add a row to the table."""
        if self._run is not None:
            self._activity = ""
            self._restart(run)
            self._shown(lambda: self._add_row(run, metrics))

    def on_eval_interrupted(self, run: Run) -> None:
        """Take the progress of the evaluation away."""
        self._activity = ""

    def on_save(self, run: Run, path: Path) -> None:
        """Say what was saved, if the run was interrupted."""
        if run.outcome.status == "interrupted":
            self.say(f"saved {path}")

    def on_fit_end(self, run: Run) -> None:
        """Show how the run ended."""
        if self._run is not None:
            self._activity = ""
            self._tick(run, self._clock())
            self._shown(lambda: self._end(run, end_banner(run)))

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Show how far the run got, and what of it is saved."""
        if self._run is not None:
            left = where_it_is_left(run) if isinstance(exception, KeyboardInterrupt) else []
            self._shown(lambda: self._end(run, left))

    def say(self, text: str) -> None:
        """Show a line that stays, at once. A signal may come while something is drawn: then after."""
        self._waiting.append(text)
        with suppress(RuntimeError):  # the signal came while the program wrote to the same stream
            self._shown(lambda: None)

    def note(self, text: str) -> None:
        """Show a line outside of a run."""
        self._shown(lambda: self._print(text))

    def doing(self, text: str) -> None:
        """Show what is done at the moment; "" if it is over."""
        if self._run is not None and text != self._activity:
            self._activity = text
            if self._next != _NEVER:
                self._draw(self._run, self._clock())

    # How it is shown.

    def _add_row(self, run: Run, metrics: Mapping[str, float]) -> None:
        if self._table is None:
            self._table = EpochTable(self._columns())
        self._print(*self._table.lines(run, metrics))

    def _end(self, run: Run, lines: list[str]) -> None:
        self._frame(run)
        self._close()
        self._print(*lines)
        self._run, self._next = None, _NEVER

    def _restart(self, run: Run) -> None:
        now = self._clock()
        self._speed.restart(run.progress.step, now)
        self._tokens.restart(run.progress.tokens, now)
        self._next = now + self._every

    def _tick(self, run: Run, now: float) -> None:
        self._speed.tick(run.progress.step, now)
        self._tokens.tick(run.progress.tokens, now)

    def _draw(self, run: Run, now: float) -> None:
        self._shown(lambda: self._frame(run))
        if self._next != _NEVER:
            self._next = now + max(self._every, (self._clock() - now) / _SHARE)

    def _shown(self, show: Callable[[], None]) -> None:
        """Show something, and what signal handlers said meanwhile.

        If nobody can see it any more, showing ends and the run continues.
        """
        if self._busy or self._gone:  # a signal handler may call this in the middle of a drawing
            return
        self._busy = True
        try:
            show()
            while self._waiting and self._run is not None:
                self._print(self._waiting[0])
                self._waiting.pop(0)
        except (OSError, ValueError):
            self._broken()
        finally:
            self._busy = False

    def _broken(self) -> None:
        """Show nothing any more: the pipe is closed, or the terminal is gone."""
        self._gone, self._run, self._next = True, None, _NEVER
