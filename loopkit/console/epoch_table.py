"""EpochTable: one row per evaluation, printed line by line, so that it fits into a log file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loopkit.console.eta import epoch_now, total_steps
from loopkit.console.text import amount, cut, number, pad, width
from loopkit.monitor import Monitor

if TYPE_CHECKING:
    from loopkit.run import Run

_GAP = 2
_NARROWEST = {"Epoch": 5, "Step": 6}
_NARROW, _WIDEST = 9, 24
_MOST_METRICS = 6
_OWN = ("eval/loss", "eval/runtime", "eval/samples_per_second")
MARK = " *"


@dataclass(frozen=True)
class EvaluationRow:
    """One evaluation.

    Attributes:
        cells: text by column: what is always shown, the metrics, and the speed of the evaluation.
        metrics: the columns that are metrics, the loss left out.
        best: whether it is the best evaluation so far.
    """

    cells: dict[str, str]
    metrics: tuple[str, ...]
    best: bool


class EpochTable:
    """A table that gets a row after each evaluation, and a new header if its columns change.

    A star marks a row that was the best when it was printed: by ``Checkpoint(best=)``, or else by
    the lowest validation loss. Training Loss is the mean over the steps since the row before.

    Args:
        cells: the most terminal cells of a line; None for no limit.
    """

    def __init__(self, cells: int | None = None) -> None:
        self._cells = cells
        self._columns: list[str] = []
        self._widths: list[int] = []
        self._best: float | None = None
        self._explained = False

    def lines(self, run: Run, metrics: Mapping[str, float]) -> list[str]:
        """Return the lines to print after an evaluation.

        Args:
            run: at the step of the evaluation.
            metrics: numbers by full name, such as "eval/loss".
        """
        row = self.row(run, metrics)
        cells = self._fitted(row, total_steps(run.length))
        new = list(cells) != self._columns
        if new:
            self._columns = list(cells)
            self._widths = [_width_of(name, total_steps(run.length)) for name in cells]
        lines = [self._line(self._columns)] if new else []
        if new:
            lines.append("-" * width(lines[0]))
        lines.append(self._line(list(cells.values())) + (MARK if row.best else ""))
        if row.best and not self._explained:
            self._explained = True
            lines.insert(0, f"(* is the best {best_by(run)} so far)")
        return lines

    def row(self, run: Run, metrics: Mapping[str, float]) -> EvaluationRow:
        """Return the row of an evaluation with all its columns."""
        epoch = epoch_now(run)
        trained = run.record.since_eval.get("train/loss")
        cells = {
            "Epoch": f"{epoch:.0f}" if epoch == int(epoch) else f"{epoch:.2f}",
            "Step": f"{run.progress.step:,}",
            "Training Loss": "-" if trained is None else number(trained),
        }
        if "eval/loss" in metrics:
            cells["Validation Loss"] = number(metrics["eval/loss"])
        found = {_title(name): number(v) for name, v in metrics.items() if name not in _OWN}
        speed = {"eval/runtime": "Runtime", "eval/samples_per_second": "Samples/s"}
        last = {
            title: amount(name, metrics[name]).removesuffix(" samples/s")
            for name, title in speed.items()
            if name in metrics
        }
        return EvaluationRow(cells | found | last, tuple(found), self._is_best(run, metrics))

    def _is_best(self, run: Run, metrics: Mapping[str, float]) -> bool:
        monitor = monitor_of(run)
        value = metrics.get(monitor.name)
        if value is None:
            return False
        if self._best is None:  # a resumed run has rows of earlier attempts
            for earlier in run.history:
                seen = earlier.get(monitor.name)
                if earlier["step"] < run.progress.step and isinstance(seen, (int, float)):
                    self._best = seen if monitor.is_better(seen, self._best) else self._best
        if not monitor.is_better(value, self._best):
            return False
        self._best = value
        return True

    def _fitted(self, row: EvaluationRow, steps: int | None) -> dict[str, str]:
        """Return the cells that fit: metrics go before the speed, and a count says what is left."""
        speed = [name for name in ("Runtime", "Samples/s") if name in row.cells]
        base = {n: t for n, t in row.cells.items() if n not in row.metrics and n not in speed}
        room = float("inf")
        if self._cells is not None:
            room = self._cells - len(MARK) - sum(_width_of(n, steps) + _GAP for n in base) + _GAP
        shown, more = list(row.metrics), ""
        while shown and (
            len(shown) > _MOST_METRICS or _needed([*shown, *([more] if more else [])]) > room
        ):
            shown.pop()
            more = f"+{len(row.metrics) - len(shown)} more"
        cells = base | {name: row.cells[name] for name in shown} | ({more: ""} if more else {})
        room -= _needed([*shown, *([more] if more else [])])
        for name in speed:
            room -= _needed([name])
            if room < 0:
                break
            cells[name] = row.cells[name]
        return cells

    def _line(self, texts: list[str]) -> str:
        cells = [pad(text, cells, right=True) for text, cells in zip(texts, self._widths)]
        return (" " * _GAP).join(cells)


def monitor_of(run: Run) -> Monitor:
    """Return what decides about the best evaluation: ``Checkpoint(best=)``, or else the loss."""
    given = run.options.monitor() if run.options is not None else None
    return given or Monitor("eval/loss", "min")


def best_by(run: Run) -> str:
    """Return the metric that decides about the best evaluation, as people read it."""
    name = monitor_of(run).name
    return "validation loss" if name == "eval/loss" else name


def _width_of(name: str, steps: int | None = None) -> int:
    if name == "Step" and steps is not None:
        return max(_NARROWEST[name], len(f"{steps:,}"))
    return max(_NARROWEST.get(name, _NARROW), width(name))


def _needed(names: list[str]) -> int:
    return sum(_width_of(name) + _GAP for name in names)


def _title(name: str) -> str:
    name = name.removeprefix("eval/")
    if name.islower() and "/" not in name:
        name = name.replace("_", " ").capitalize()
    return cut(name, _WIDEST)
