"""RichProgress: a bar on a terminal or in a notebook, with the last values below it."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loopkit.console.banner import closing, opening
from loopkit.console.eta import Eta, SpeedEstimate, epoch_text, outlook
from loopkit.console.plain_progress import latest
from loopkit.console.table import EpochTable
from loopkit.console.text import duration, number, rate
from loopkit.events import Hook

if TYPE_CHECKING:
    from loopkit.run import Run

_NEVER = float("inf")
_LABEL = 10


class Screen(Console):
    """A rich Console whose closed pipe is an ordinary error; rich would end the program."""

    def on_broken_pipe(self) -> None:
        """Pass it on."""
        raise BrokenPipeError("nobody reads the progress any more")


class RichProgress(Hook):
    """Redraws a bar at most ten times a second; a row per evaluation and whatever is printed appear
    above it.

    Between redraws a step costs one look at the clock. What it shows are numbers that were logged:
    it reads nothing from the device. The cursor stays visible, so that even a killed run leaves a
    sane terminal. Rank 0 alone draws.

    Args:
        every: seconds between redraws, at least.
        console: where to draw; None is a rich Console on stderr.
        clock: seconds, for tests.
    """

    may_request = False

    def __init__(
        self,
        every: float = 0.1,
        console: Console | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        self._every = every
        self._console = console
        self._clock = clock
        self._next = _NEVER
        self._live: Live | None = None
        self._fitting = False
        self._pace = SpeedEstimate()
        self._table: EpochTable | None = None
        self._batches = 0
        self._eval_total: int | None = None
        self._evaluating = False

    def on_fit_start(self, run: Run) -> None:
        """Say what is about to be done, and begin to draw."""
        if run.strategy.rank == 0:
            self._fitting = True
            self._pace.restart(run.progress.step, self._clock())
            self._show(*opening(run))
            self._start(run)

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Redraw, where it is time."""
        now = self._clock()
        if now < self._next:
            return
        self._pace.tick(run.progress.step, now)
        self._draw(run, now)

    def on_eval_start(self, run: Run) -> None:
        """Show a second bar."""
        if run.strategy.rank == 0:
            self._pace.tick(run.progress.step, self._clock())
            counts = [source.batches_per_epoch() for source in run.eval_data.values()]
            known = [count for count in counts if count is not None]
            self._eval_total = sum(known) or None if len(known) == len(counts) else None
            self._batches, self._evaluating = 0, True
            self._start(run)

    def on_eval_step_end(self, run: Run, outputs: Mapping[str, Any]) -> None:
        """Redraw, where it is time."""
        self._batches += 1
        now = self._clock()
        if now >= self._next:
            self._draw(run, now)

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Add a row to the table above the bar."""
        if run.strategy.rank != 0:
            return
        self._evaluating = False
        if not self._fitting:
            self._stop()
        if self._table is None:
            self._table = EpochTable(self._screen().width)
        self._pace.restart(run.progress.step, self._clock())
        if self._live is not None:
            self._live.update(self._frame(run))
        self._show(*self._table.lines(run, metrics))

    def on_fit_end(self, run: Run) -> None:
        """Leave the finished bar, and say how it ended."""
        if run.strategy.rank == 0:
            self._pace.tick(run.progress.step, self._clock())
            self._draw(run, self._clock())
            self._stop()
            self._show(closing(run))

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Leave the bar as it stands, below it a clean line."""
        if self._live is not None:
            self._draw(run, self._clock())
        self._stop()

    def _screen(self) -> Console:
        if self._console is None:
            self._console = Screen(stderr=True, highlight=False)
        return self._console

    def _start(self, run: Run) -> None:
        """Begin to draw, unless drawing is under way; prints and warnings go above from now on."""
        if self._live is None:
            # What goes to a file or another program must not end up on the screen.
            shared = sys.stdout is not None and sys.stdout.isatty()
            screen = self._screen()
            self._live = Live(
                console=screen,
                auto_refresh=False,
                redirect_stdout=shared or screen.is_jupyter,
                transient=False,
            )
            self._live.update(self._frame(run))
            self._guarded(self._live.start)
            self._guarded(lambda: screen.show_cursor(True))
            atexit.register(self._stop)
        self._draw(run, self._clock())

    def _draw(self, run: Run, now: float) -> None:
        if self._live is not None:
            live, self._next = self._live, now + self._every
            self._guarded(lambda: live.update(self._frame(run), refresh=True))

    def _stop(self) -> None:
        live, self._live, self._next = self._live, None, _NEVER
        if live is not None:
            atexit.unregister(self._stop)
            self._guarded(live.stop)

    def _show(self, *lines: str) -> None:
        self._guarded(
            partial(self._screen().print, Text("\n".join(lines), no_wrap=True), soft_wrap=True)
        )

    def _guarded(self, call: Callable[[], Any]) -> None:
        """Training goes on when the terminal is gone."""
        try:
            call()
        except (OSError, ValueError):
            live, self._live, self._next = self._live, None, _NEVER
            if live is not None:
                with suppress(OSError, ValueError):
                    live.stop()

    def _frame(self, run: Run) -> RenderableType:
        """The bar, the last values, and during an evaluation its own bar."""
        parts: list[RenderableType] = []
        if self._fitting:
            ahead = outlook(run, self._pace.rate)
            parts.append(
                _bar(f"Epoch {epoch_text(run)}", run.progress.step, ahead, self._facts(run, ahead))
            )
            values = latest(run.metrics) | latest(run.metrics, evaluated=True)
            if values:
                shown = "   ".join(f"{name} {number(value)}" for name, value in values.items())
                parts.append(
                    Text(" " * (_LABEL + 1) + shown, style="dim", no_wrap=True, overflow="ellipsis")
                )
        if self._evaluating:
            done = self._batches / self._eval_total if self._eval_total else None
            total = "" if self._eval_total is None else f"/{self._eval_total:,}"
            ahead = Eta(self._eval_total, done, None)
            parts.append(
                _bar("Evaluating", self._batches, ahead, f"{self._batches:,}{total} batches")
            )
        return Group(*parts)

    def _facts(self, run: Run, ahead: Eta) -> str:
        total = "" if ahead.total is None else f"/{ahead.total:,}"
        left = "" if ahead.left is None else f" < {duration(ahead.left)}"
        return f"{run.progress.step:,}{total}  {rate(self._pace.rate)}  {duration(run.seconds())}{left}"


def _bar(label: str, step: int, ahead: Eta, facts: str) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(min_width=_LABEL, no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    known = ahead.done is not None
    bar = ProgressBar(total=1.0 if known else None, completed=ahead.done or 0.0, pulse=not known)
    grid.add_row(Text(label, style="bold"), bar, Text(facts))
    return grid
