"""EpochTable: one row per evaluation, printed line by line, so that it fits into a log file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loopkit.console.eta import epoch_now
from loopkit.console.text import cut, duration, number, pad, width

if TYPE_CHECKING:
    from loopkit.run import Run

_GAP = 2
_NARROWEST, _WIDEST = 10, 24
_MOST_METRICS = 6
_OWN = ("eval/loss", "eval/runtime", "eval/samples_per_second")


class EpochTable:
    """A table that gets a row after each evaluation, and a new header if its columns change.

    Args:
        cells: the most terminal cells of a line; None for no limit.
    """

    def __init__(self, cells: int | None = None) -> None:
        self._cells = cells
        self._columns: list[str] = []

    def lines(self, run: Run, metrics: Mapping[str, float]) -> list[str]:
        """Return the lines to print after an evaluation.

        Args:
            run: at the step of the evaluation.
            metrics: numbers by full name, such as "eval/loss".
        """
        row = self._row(run, metrics)
        widths = [max(_NARROWEST, width(name)) for name in row]
        cells = [pad(text, cells, right=True) for text, cells in zip(row.values(), widths)]
        line = (" " * _GAP).join(cells)
        if list(row) == self._columns:
            return [line]
        self._columns = list(row)
        names = [pad(name, cells, right=True) for name, cells in zip(row, widths)]
        header = (" " * _GAP).join(names)
        return [header, "-" * width(header), line]

    def _row(self, run: Run, metrics: Mapping[str, float]) -> dict[str, str]:
        """Return the cells by column, as many metrics among them as the width allows."""
        epoch = epoch_now(run)
        trained = run.metrics.get("train/loss")
        row = {
            "Epoch": f"{epoch:.0f}" if epoch == int(epoch) else f"{epoch:.2f}",
            "Step": f"{run.progress.step:,}",
            "Training Loss": "-" if trained is None else number(trained),
        }
        if "eval/loss" in metrics:
            row["Validation Loss"] = number(metrics["eval/loss"])
        last = {}
        if "eval/runtime" in metrics:
            seconds = metrics["eval/runtime"]
            last["Runtime"] = f"{seconds:.2f} s" if seconds < 100 else duration(seconds)
        if "eval/samples_per_second" in metrics:
            last["Samples/s"] = f"{metrics['eval/samples_per_second']:,.1f}"
        extra = {_title(name): number(value) for name, value in metrics.items() if name not in _OWN}
        room = self._room([*row, *last])
        for name in list(extra)[:_MOST_METRICS]:
            room -= max(_NARROWEST, width(name)) + _GAP
            if room < 0:
                break
            row[name] = extra[name]
        return row | last

    def _room(self, names: list[str]) -> float:
        """Return how many cells are free beside the columns ``names``."""
        if self._cells is None:
            return float("inf")
        return self._cells - sum(max(_NARROWEST, width(name)) + _GAP for name in names) + _GAP


def _title(name: str) -> str:
    name = name.removeprefix("eval/")
    if name.islower() and "/" not in name:
        name = name.replace("_", " ").capitalize()
    return cut(name, _WIDEST)
