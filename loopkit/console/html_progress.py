"""HtmlProgress: a bar and a table in a notebook, updated in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Any

from loopkit.console.display import Display
from loopkit.console.epoch_table import EpochTable, EvaluationRow
from loopkit.console.eta import epoch_text, estimate
from loopkit.console.html import bar, block, evaluation_table, text_lines
from loopkit.console.latest_values import shown_values
from loopkit.console.text import duration, rate

if TYPE_CHECKING:
    from loopkit.run import Run


class HtmlProgress(Display):
    """Show a bar and a table with a row per evaluation below the cell, and update them in place.

    It needs no widgets, and the last state stays in the saved notebook. Nothing goes to stderr.

    Args:
        every: the least number of seconds between updates.
        show: a function that shows HTML, first and again in place of what it showed before; None
            for that of IPython.
        clock: returns seconds; for tests.
    """

    def __init__(
        self,
        every: float = 0.5,
        show: Callable[[str], None] | None = None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        super().__init__(every, clock)
        self._show = show or InCell()
        self._rows = EpochTable()
        self._table_rows: list[EvaluationRow] = []
        self._head: list[str] = []
        self._lines: list[str] = []
        self._bars = ""

    def note(self, text: str) -> None:
        """Show a line outside of a run."""
        self._show(block(text_lines([text])))

    def _print(self, *lines: str) -> None:
        (self._lines if self._bars else self._head).extend(lines)
        if self._bars:
            self._update()

    def _open(self, run: Run) -> None:
        self._frame(run)

    def _frame(self, run: Run) -> None:
        eta = estimate(run, self._speed.rate)
        steps = f"{run.progress.step:,}" + ("" if eta.total is None else f"/{eta.total:,}")
        left = "" if eta.left is None else f" < {duration(eta.left)}"
        facts = f"{steps}  {rate(self._speed.rate)}  {duration(run.seconds())}{left}"
        self._bars = bar(f"Epoch {epoch_text(run)}", eta.done, facts)
        values = shown_values(run, self._tokens.rate)
        self._bars += text_lines(["   ".join(f"{name} {text}" for name, text in values.items())])
        if self._activity == "evaluating":
            total = "" if self._eval_total is None else f"/{self._eval_total:,}"
            done = self._batches / self._eval_total if self._eval_total else None
            self._bars += bar("Evaluating", done, f"{self._batches:,}{total} batches")
        elif self._activity:
            self._bars += text_lines([self._activity])
        self._update()

    def _add_row(self, run: Run, metrics: Mapping[str, float]) -> None:
        self._table_rows.append(self._rows.row(run, metrics))
        self._frame(run)

    def _update(self) -> None:
        table = evaluation_table(self._table_rows)
        self._show(block(text_lines(self._head), self._bars, table, text_lines(self._lines)))


class InCell:
    """Shows HTML below the cell that runs, and replaces it at each call."""

    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, text: str) -> None:
        """Show ``text``."""
        import IPython.display

        shown: Any = IPython.display  # without types
        if self._handle is None:
            self._handle = shown.display(shown.HTML(text), display_id=True)
        else:
            self._handle.update(shown.HTML(text))
