"""Curves as SVG: a small picture that a notebook or a page shows without any library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from loopkit.console.text import number

_WIDTH, _HEIGHT = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 26, 24
_COLORS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2")
_MOST_POINTS = 300
Points = Sequence[tuple[float, float]]


def curves(title: str, series: Mapping[str, Points]) -> str:
    """Return a picture of curves over steps; "" if no curve has a finite value.

    Text and axes have the colour of the text around, so the picture suits light and dark pages.

    Args:
        title: what the vertical axis shows.
        series: (step, value) in order, by name. Points that are not finite are left out, and long
            series are thinned to 300 points.
    """
    finite = {n: [(x, y) for x, y in points if math.isfinite(y)] for n, points in series.items()}
    kept = {name: _thinned(points) for name, points in finite.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    across = _Scale(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    up = _Scale(min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" style="font:11px sans-serif;max-width:100%" '
        'fill="currentColor">'
    ]
    for value in (up.low, (up.low + up.high) / 2, up.high):
        y = up(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity=".2"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    for value, anchor in ((across.low, "start"), (across.high, "end")):
        parts.append(
            f'<text x="{across(value):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">'
            f"step {value:,.0f}</text>"
        )
    at = float(_LEFT)
    for color, (name, points) in zip(_COLORS * (1 + len(kept) // len(_COLORS)), kept.items()):
        line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        dots = points if len(points) <= 30 else points[-1:]
        parts += [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="2.2" fill="{color}">'
            f"<title>{escape(name)} {number(y)} at step {x:,.0f}</title></circle>"
            for x, y in dots
        ]
        parts.append(f'<text x="{at:.0f}" y="14" style="fill:{color}">{escape(name)}</text>')
        at += 7 * len(name) + 14
    return "".join([*parts, "</svg>"])


class _Scale:
    """Maps values from ``low`` to ``high`` to places from ``start`` to ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5
        return self._start + share * (self._end - self._start)


def _thinned(points: Points) -> Points:
    each = math.ceil(len(points) / _MOST_POINTS)
    return [*points[:-1:each], points[-1]]
