"""RichProgress: a bar on a terminal, with the last values below it."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions
from rich.live import Live
from rich.segment import Segment
from rich.style import Style
from rich.text import Text

from loopkit.console.display import Display
from loopkit.console.epoch_table import MARK
from loopkit.console.eta import epoch_text, estimate
from loopkit.console.latest_values import shown_values, values_line
from loopkit.console.text import cut, duration, pad, rate, width

if TYPE_CHECKING:
    from loopkit.run import Run

_LABEL = 11
_SHORTEST = 8
_BOLD, _DIM = Style(bold=True), Style(dim=True)
_DONE, _OVER, _TO_COME = Style(color="magenta"), Style(color="green"), Style(color="bright_black")


class Screen(Console):
    """A rich Console that raises an error if its pipe is closed; rich would end the program."""

    def on_broken_pipe(self) -> None:
        """Raise an error."""
        raise BrokenPipeError("nobody reads the progress any more")


class BarLines:
    """BarLines of styled text for rich, ready to write: they need no measuring and no layout."""

    def __init__(self, lines: list[list[Segment]]) -> None:
        self.lines = lines

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for number, line in enumerate(self.lines):
            if number:
                yield Segment.line()
            yield from line


class RichProgress(Display):
    """Draw a progress bar, with a row per evaluation and everything that is printed above it.

    The hook reads nothing from an accelerator. The cursor stays visible, so that even a run that is
    killed leaves the terminal usable.

    Args:
        every: the least number of seconds between redraws.
        console: the console to draw on; None for a rich Console on stderr.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        every: float = 0.25,
        console: Console | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        super().__init__(every, clock)
        self._console = console
        self._live: Live | None = None

    def _screen(self) -> Console:
        if self._console is None:
            self._console = Screen(stderr=True, highlight=False)
        return self._console

    def _columns(self) -> int:
        return self._screen().width

    def _open(self, run: Run) -> None:
        """Begin to draw. From now on, everything that is printed appears above the bar."""
        # Output that goes to a file or to another program must not appear on the screen.
        shared = sys.stdout is not None and sys.stdout.isatty()
        screen = self._screen()
        self._live = Live(
            console=screen,
            auto_refresh=False,
            redirect_stdout=shared or screen.is_jupyter,
            transient=False,
        )
        atexit.register(self._close)
        self._live.update(self._lines(run))
        self._live.start()
        screen.show_cursor(True)

    def _frame(self, run: Run) -> None:
        if self._live is not None:
            self._live.update(self._lines(run), refresh=True)

    def _close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            atexit.unregister(self._close)
            live.stop()

    def _broken(self) -> None:
        super()._broken()
        with suppress(OSError, ValueError):
            self._close()

    def _print(self, *lines: str) -> None:
        if not lines:
            return
        if self._live is not None and self._run is not None:
            self._live.update(self._lines(self._run))
        text = Text(no_wrap=True)
        for number, line in enumerate(lines):
            best = line.endswith(MARK)
            text.append(("\n" if number else "") + line, style="bold green" if best else "")
        self._screen().print(text, soft_wrap=True)

    def _lines(self, run: Run) -> BarLines:
        """Return the bar, the last values or what is being done, and the bar of an evaluation."""
        cells, fancy = self._screen().width, self._screen().encoding.startswith("utf")
        eta = estimate(run, self._speed.rate)
        steps = f"{run.progress.step:,}" + ("" if eta.total is None else f"/{eta.total:,}")
        left = "" if eta.left is None else f" < {duration(eta.left)}"
        facts = [steps, rate(self._speed.rate), f"{duration(run.seconds())}{left}"]
        lines = [_bar(f"Epoch {epoch_text(run)}", eta.done, facts, cells, fancy)]
        if self._activity == "evaluating":
            lines.append(self._values(run, cells))
            total = "" if self._eval_total is None else f"/{self._eval_total:,}"
            done = self._batches / self._eval_total if self._eval_total else None
            lines.append(
                _bar("Evaluating", done, [f"{self._batches:,}{total} batches"], cells, fancy)
            )
        elif self._activity:
            lines.append([Segment(" " * _LABEL + cut(self._activity, cells - _LABEL), _BOLD)])
        else:
            lines.append(self._values(run, cells))
        return BarLines([line for line in lines if line])

    def _values(self, run: Run, cells: int) -> list[Segment]:
        values = shown_values(run, self._tokens.rate)
        line = values_line(values, cells - _LABEL)
        return [Segment(" " * _LABEL + line, _DIM)] if line else []


def _bar(
    label: str, done: float | None, facts: list[str], cells: int, fancy: bool
) -> list[Segment]:
    """Return a bar between a label and facts, of which the last go first where it is narrow."""
    label = pad(cut(label, _LABEL - 1), _LABEL)
    while len(facts) > 1 and width("  ".join(facts)) + 1 + _LABEL + _SHORTEST > cells:
        facts = facts[:-1]
    text = "  ".join(facts)
    room = cells - width(label) - width(text) - 1
    if room < 1:
        return [Segment(cut(f"{label}{text}", cells), _BOLD)]
    full, empty = ("━", "─") if fancy else ("=", "-")
    filled = round(room * min(1.0, done or 0.0))
    style = _OVER if done is not None and done >= 1 else _DONE
    return [
        Segment(label, _BOLD),
        Segment(full * filled, style),
        Segment(empty * (room - filled), _TO_COME),
        Segment(f" {text}"),
    ]
