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

from loopkit.console.banner import end_banner, start_banner
from loopkit.console.epoch_table import EpochTable
from loopkit.console.eta import Eta, SpeedEstimate, epoch_text, estimate
from loopkit.console.plain_progress import latest
from loopkit.console.text import duration, number, rate
from loopkit.events import Hook

if TYPE_CHECKING:
    from loopkit.run import Run

_NEVER = float("inf")
_LABEL = 10


class Screen(Console):
    """A rich Console that raises an error if its pipe is closed; rich would end the program."""

    def on_broken_pipe(self) -> None:
        """Raise an error."""
        raise BrokenPipeError("nobody reads the progress any more")


class RichProgress(Hook):
    """Draw a progress bar, with a row per evaluation and everything that is printed above it.

    Rank 0 alone draws. Between redraws, a step only reads the clock. The numbers shown are those
    that were logged, so the hook reads nothing from the device. The cursor stays visible, so that
    even a run that is killed leaves the terminal usable.

    Args:
        every: the least number of seconds between redraws.
        console: the console to draw on; None for a rich Console on stderr.
        clock: returns seconds; for tests.
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
        self._speed = SpeedEstimate()
        self._table: EpochTable | None = None
        self._batches = 0
        self._eval_total: int | None = None
        self._evaluating = False

    def on_fit_start(self, run: Run) -> None:
        """Print what is trained, and begin to draw."""
        if run.strategy.rank == 0:
            self._fitting = True
            self._speed.restart(run.progress.step, self._clock())
            self._show(*start_banner(run))
            self._start(run)

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Redraw, if a redraw is due."""
        now = self._clock()
        if now < self._next:
            return
        self._speed.tick(run.progress.step, now)
        self._draw(run, now)

    def on_eval_start(self, run: Run) -> None:
        """Show a second bar."""
        if run.strategy.rank == 0:
            self._speed.tick(run.progress.step, self._clock())
            counts = [source.batches_per_epoch() for source in run.eval_data.values()]
            known = [count for count in counts if count is not None]
            self._eval_total = sum(known) or None if len(known) == len(counts) else None
            self._batches, self._evaluating = 0, True
            self._start(run)

    def on_eval_step_end(self, run: Run, outputs: Mapping[str, Any]) -> None:
        """Redraw, if a redraw is due."""
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
        self._speed.restart(run.progress.step, self._clock())
        if self._live is not None:
            self._live.update(self._frame(run))
        self._show(*self._table.lines(run, metrics))

    def on_eval_interrupted(self, run: Run) -> None:
        """Take the second bar away."""
        self._evaluating = False

    def on_fit_end(self, run: Run) -> None:
        """Leave the finished bar, and print how the run ended."""
        if run.strategy.rank == 0:
            self._speed.tick(run.progress.step, self._clock())
            self._draw(run, self._clock())
            self._stop()
            self._show(end_banner(run))

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Leave the bar as it is, with a clean line below it."""
        if self._live is not None:
            self._draw(run, self._clock())
        self._stop()

    def _screen(self) -> Console:
        if self._console is None:
            self._console = Screen(stderr=True, highlight=False)
        return self._console

    def _start(self, run: Run) -> None:
        """Begin to draw. From now on, everything that is printed appears above the bar."""
        if self._live is None:
            # Output that goes to a file or to another program must not appear on the screen.
            shared = sys.stdout is not None and sys.stdout.isatty()
            screen = self._screen()
            self._live = Live(
                console=screen,
                auto_refresh=False,
                redirect_stdout=shared or screen.is_jupyter,
                transient=False,
            )
            self._live.update(self._frame(run))
            self._call(self._live.start)
            self._call(lambda: screen.show_cursor(True))
            atexit.register(self._stop)
        self._draw(run, self._clock())

    def _draw(self, run: Run, now: float) -> None:
        if self._live is not None:
            live, self._next = self._live, now + self._every
            self._call(lambda: live.update(self._frame(run), refresh=True))

    def _stop(self) -> None:
        live, self._live = self._live, None
        self._next = _NEVER
        if live is not None:
            atexit.unregister(self._stop)
            self._call(live.stop)

    def _show(self, *lines: str) -> None:
        self._call(
            partial(self._screen().print, Text("\n".join(lines), no_wrap=True), soft_wrap=True)
        )

    def _call(self, call: Callable[[], Any]) -> None:
        """Call a function that draws. If the terminal is gone, stop to draw; the run continues."""
        try:
            call()
        except (OSError, ValueError):
            live, self._live = self._live, None
            self._next = _NEVER
            if live is not None:
                with suppress(OSError, ValueError):
                    live.stop()

    def _frame(self, run: Run) -> RenderableType:
        """Return the bar, the last values, and during an evaluation a second bar."""
        parts: list[RenderableType] = []
        if self._fitting:
            eta = estimate(run, self._speed.rate)
            parts.append(_bar(f"Epoch {epoch_text(run)}", eta, self._facts(run, eta)))
            values = latest(run.metrics) | latest(run.metrics, evaluated=True)
            if values:
                shown = "   ".join(f"{name} {number(value)}" for name, value in values.items())
                parts.append(
                    Text(" " * (_LABEL + 1) + shown, style="dim", no_wrap=True, overflow="ellipsis")
                )
        if self._evaluating:
            done = self._batches / self._eval_total if self._eval_total else None
            total = "" if self._eval_total is None else f"/{self._eval_total:,}"
            eta = Eta(self._eval_total, done, None)
            parts.append(_bar("Evaluating", eta, f"{self._batches:,}{total} batches"))
        return Group(*parts)

    def _facts(self, run: Run, eta: Eta) -> str:
        """Return the steps, the speed and the times that stand at the right of the bar."""
        steps = f"{run.progress.step:,}" + ("" if eta.total is None else f"/{eta.total:,}")
        left = "" if eta.left is None else f" < {duration(eta.left)}"
        return f"{steps}  {rate(self._speed.rate)}  {duration(run.seconds())}{left}"


def _bar(label: str, eta: Eta, facts: str) -> Table:
    grid = Table.grid(padding=(0, 1), expand=True)
    grid.add_column(min_width=_LABEL, no_wrap=True)
    grid.add_column(ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    # Without a total, the bar shows only that something happens.
    bar = ProgressBar(total=None if eta.done is None else 1.0, completed=eta.done or 0.0)
    grid.add_row(Text(label, style="bold"), bar, Text(facts))
    return grid
