"""A run and its result as HTML, for a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from loopkit.console.epoch_table import EvaluationRow
from loopkit.console.summary import best_of, head_lines
from loopkit.console.svg import curves
from loopkit.console.text import amount, is_speed, number

if TYPE_CHECKING:
    from loopkit.result import Result

MOST_ROWS = 60
_MOST_CURVES = 6
_LOSSES = ("train/loss", "eval/loss")
_CELL = "padding:2px 10px;text-align:right"
_COLORS = {"finished": "#2e7d32", "stopped": "#b26a00", "interrupted": "#c62828"}


def block(*parts: str) -> str:
    """Return a block of HTML with all parts that are not empty."""
    inside = "".join(part for part in parts if part)
    return f'<div style="font-size:13px;line-height:1.5">{inside}</div>'


def text_lines(lines: Sequence[str]) -> str:
    """Return lines of plain text, with their spaces."""
    if not lines:
        return ""
    return f'<pre style="margin:2px 0;background:none">{escape(chr(10).join(lines))}</pre>'


def bar(label: str, done: float | None, facts: str) -> str:
    """Return a bar between a label and facts; without ``done`` it has no end."""
    value = "" if done is None else f' value="{min(1.0, done):.4f}"'
    return (
        f'<div><b>{escape(label)}</b> <progress max="1"{value} '
        f'style="width:260px;vertical-align:middle"></progress> {escape(facts)}</div>'
    )


def evaluation_table(rows: Sequence[EvaluationRow]) -> str:
    """Return the evaluations as a table, the best one in bold; of many rows the last ones."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    best = max((place for place, row in enumerate(rows) if row.best), default=-1)
    head = "".join(f'<th style="{_CELL}">{escape(name)}</th>' for name in names)
    lines = [f"<tr>{head}</tr>"]
    first = max(0, len(rows) - MOST_ROWS)
    for place, row in enumerate(rows):
        if place < first and place != best:
            continue
        weight = ";font-weight:bold" if place == best else ""
        cells = [f'<td style="{_CELL}{weight}">{escape(row.cells.get(n, ""))}</td>' for n in names]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    left_out = f"<div>{first:,} earlier rows are not shown</div>" if first else ""
    return f'<table style="border-collapse:collapse">{"".join(lines)}</table>{left_out}'


def result_html(result: Result) -> str:
    """Return a result as HTML: status, facts, metrics, curves, and the next lines to type."""
    reason = f": {result.reason}" if result.reason else ""
    color = _COLORS.get(result.status, "inherit")
    title = f'<div><b style="color:{color}">{escape(result.status + reason)}</b></div>'
    best = best_of(result)
    facts = head_lines(result)
    if best is not None:
        step = "" if best.step is None else f" at step {best.step:,} of {result.step:,}"
        facts["best"] = f"{best.metric} {number(best.value)}{step}"
        if best.checkpoint is not None:
            facts["best checkpoint"] = str(best.checkpoint)
    metrics = {
        name: amount(name, value)
        for name, value in result.metrics.items()
        if name.startswith(("train/", "eval/"))
    }
    losses, others = _series(result.history)
    pictures = curves("loss", losses) + curves("metrics", others)
    commands = [f"{name:<8}  {line}" for name, line in result.next_lines.items()]
    return block(title, _pairs(facts), _pairs(metrics), pictures, text_lines(commands))


def _pairs(values: Mapping[str, str]) -> str:
    rows = [
        f'<tr><td style="padding:1px 12px 1px 0;text-align:left">{escape(name)}</td>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for name, text in values.items()
    ]
    table = '<table style="border-collapse:collapse;margin:4px 24px 4px 0;display:inline-table">'
    return f"{table}{''.join(rows)}</table>" if rows else ""


def _series(
    history: Sequence[Mapping[str, float]],
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float]]]]:
    """Return the curves of the losses, and those of the other metrics of evaluations."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        for name, value in row.items():
            if name.startswith(("train/", "eval/")) and isinstance(value, (int, float)):
                found.setdefault(name, []).append((row["step"], value))
    losses = {name: points for name, points in found.items() if name in _LOSSES}
    others = {n: p for n, p in found.items() if n.startswith("eval/") and n not in losses}
    shown = [name for name in others if not is_speed(name)][:_MOST_CURVES]
    return losses, {name: others[name] for name in shown}
