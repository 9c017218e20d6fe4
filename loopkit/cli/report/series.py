"""The curves of a run: few enough points for a page, over steps, epochs and time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from loopkit.cli.report.run_data import AXES, RunData, finite, is_number, seconds_of

MOST_POINTS = 2000

Axis = dict[str, list[Any]]


def curves(run: RunData) -> tuple[list[Axis], dict[str, dict[str, Any]]]:
    """Return the axes that curves lie over, and the curves by name.

    Returns:
        Axes, each with "step", "epoch" and "time" of equal length; "epoch" and "time" hold None
        where they are not known. Time is seconds of running since the start, without the pauses
        between attempts. A curve has the number of its "axis", its "value"s (None for NaN and
        infinities), and the "count" of values before some were left out.
    """
    found: dict[str, tuple[list[int], list[float]]] = {}
    for at, row in enumerate(run.rows):
        for name, value in row.items():
            if name not in AXES and is_number(value):
                places, values = found.setdefault(name, ([], []))
                places.append(at)
                values.append(value)
    epochs, times = _epochs(run.rows), _times(run)
    axes: list[Axis] = []
    numbers: dict[tuple[int, ...], int] = {}
    drawn: dict[str, dict[str, Any]] = {}
    for name, (places, values) in found.items():
        kept = thinned(values)
        chosen = tuple(places[at] for at in kept)
        if chosen not in numbers:
            numbers[chosen] = len(axes)
            axes.append(
                {
                    "step": [run.rows[at]["step"] for at in chosen],
                    "epoch": [epochs[at] for at in chosen],
                    "time": [times[at] for at in chosen],
                }
            )
        drawn[name] = {
            "axis": numbers[chosen],
            "value": [_short(values[at]) for at in kept],
            "count": len(values),
        }
    return axes, drawn


def thinned(values: Sequence[float], most: int = MOST_POINTS) -> list[int]:
    """Return the places of at most about ``most`` values: the lowest and highest of equal spans.

    The first and the last value are among them, and all values if there are few.
    """
    count = len(values)
    if count <= most:
        return list(range(count))
    kept = {0, count - 1}
    span = count / (most // 2)
    for part in range(most // 2):
        places = range(int(part * span), int((part + 1) * span))
        known = [at for at in places if values[at] == values[at]] or list(places)
        kept |= {min(known, key=values.__getitem__), max(known, key=values.__getitem__)}
    return sorted(kept)


def _epochs(rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """Return the epoch of each row; between two rows that say it, in proportion to the steps."""
    known = {row["step"]: row["epoch"] for row in rows if is_number(row.get("epoch"))}
    if not known:
        return [None] * len(rows)
    steps, found = list(known), list(known.values())
    epochs: list[float | None] = []
    for row in rows:
        at = bisect_left(steps, row["step"])
        if at < len(steps) and steps[at] == row["step"]:
            epochs.append(round(found[at], 4))
        elif 0 < at < len(steps):
            part = (row["step"] - steps[at - 1]) / (steps[at] - steps[at - 1])
            epochs.append(round(found[at - 1] + part * (found[at] - found[at - 1]), 4))
        else:
            epochs.append(round(found[min(at, len(steps) - 1)], 4))
    return epochs


def _times(run: RunData) -> list[float | None]:
    """Return the seconds of running at each row."""
    logged = [row.get("time") for row in run.rows]
    known = [float(value) for value in logged if is_number(value) and value is not None]
    started = seconds_of(run.about.get("started"))
    first = min(known, default=0.0) if started is None else started
    gaps = run.gaps()

    def running(at: float) -> float:
        # "started" is in whole seconds.
        paused = sum(end - began for began, end in gaps if at >= end - 1)
        return round(max(0.0, at - first - paused), 2)

    return [None if value is None else running(value) for value in logged]


def _short(value: float) -> float | None:
    known = finite(value)
    return None if known is None else float(f"{known:.6g}")
