"""Numbers, durations and columns as text for people."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence


def width(text: str) -> int:
    """Return how many terminal cells ``text`` takes."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def pad(text: str, cells: int, *, right: bool = False) -> str:
    """Return ``text`` padded with spaces to ``cells``; with ``right`` it is aligned to the right."""
    space = " " * (cells - width(text))
    return space + text if right else text + space


def cut(text: str, cells: int) -> str:
    """Return ``text`` cut to at most ``cells``, with an ellipsis if anything is left out."""
    if width(text) <= cells:
        return text
    while text and width(text) > cells - 1:
        text = text[:-1]
    return f"{text}…"


def number(value: float) -> str:
    """Return a number with four decimals, or as a power of ten if it is very small or large."""
    size = abs(value)
    if not math.isfinite(value):
        return str(float(value))
    if size >= 1e4:
        return f"{value:,.0f}" if size < 1e9 else f"{value:.3e}"
    return f"{value:.4f}" if size >= 1e-3 or size == 0 else f"{value:.2e}"


def duration(seconds: float) -> str:
    """Return seconds as ``0:07``, ``12:34``, ``1:02:03`` or ``2d 03:04:05``."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def rate(per_second: float | None) -> str:
    """Return ``12.3 it/s``, or ``4.56 s/it`` if a step takes longer than a second."""
    if not per_second:
        return "- it/s"
    if per_second < 1:
        return f"{1 / per_second:.2f} s/it"
    return f"{per_second:.1f} it/s" if per_second < 1000 else f"{per_second:,.0f} it/s"


def byte_size(size: int) -> str:
    """Return bytes as ``456 B``, ``38.4 kB``, ``12.3 MB``, ``269 MB`` or ``1.20 GB``."""
    if size < 1000:
        return f"{size} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        if size < 999.5 * scale:
            return (
                f"{size / scale:.1f} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
            )
    return f"{size / 1e9:,.2f} GB"


def amount(name: str, value: float) -> str:
    """Return the value of a metric with its unit, where the name tells the unit."""
    if name.endswith("runtime"):
        return f"{value:.2f} s" if value < 100 else duration(value)
    if name.endswith("_per_second"):
        per_second = f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
        return f"{per_second} {name.rpartition('/')[2].removesuffix('_per_second')}/s"
    return number(value)


def is_speed(name: str) -> bool:
    """Return whether a metric of an evaluation measures its time, and not the model."""
    return name.endswith(("/runtime", "/samples_per_second"))


def columns(rows: Sequence[Sequence[str]], right: Sequence[bool], gap: int = 2) -> list[str]:
    """Return rows of cells as aligned lines.

    Args:
        rows: of equal length.
        right: for each column, whether it is aligned to the right.
        gap: spaces between columns.
    """
    widths = [max(width(row[at]) for row in rows) for at in range(len(right))]
    lines = []
    for row in rows:
        cells = [pad(cell, cells, right=at) for cell, cells, at in zip(row, widths, right)]
        lines.append((" " * gap).join(cells).rstrip())
    return lines
