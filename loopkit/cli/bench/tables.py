"""What ``loopkit bench`` measured, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loopkit.cli.evaluate import strict
from loopkit.console.text import columns, cut, megabytes, number
from loopkit.version import __version__

# Bits that a parameter takes; in 8 and 4 bits without the scales that are kept for each block of
# them.
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "4-bit": 4}
WIDTH = 100


@dataclass(frozen=True)
class Row:
    """One run.

    Attributes:
        labels: what it was made with, by name.
        facts: what ``probe.measure`` found.
        note: what a reader of its numbers should know.
    """

    labels: Mapping[str, str]
    facts: Mapping[str, Any]
    note: str = ""

    @property
    def measured(self) -> bool:
        """Whether the run came to its end."""
        return self.facts["problem"] is None

    @property
    def shown(self) -> str:
        """The labels on one line."""
        if len(self.labels) == 1:
            return next(iter(self.labels.values()))
        return ", ".join(f"{name}={value}" for name, value in self.labels.items())


def speed(title: str, rows: Sequence[Row]) -> list[str]:
    """Time, throughput, memory and loss of each run."""
    table = [[*rows[0].labels, "ms/step", "samples/s", "peak memory", "loss"]]
    for row in rows:
        facts, cells = row.facts, ["-"] * 4
        if row.measured:
            cells = [
                f"{facts['step_ms']:,.2f}",
                f"{facts['samples_per_second']:,.0f}",
                _size(facts["peak_bytes"]),
            ]
            cells.append("-" if facts["loss"] is None else number(facts["loss"]))
        table.append([*row.labels.values(), *cells])
    right = [*(False for _ in rows[0].labels), True, True, True, True]
    return [_head(title, rows), "", *columns(table, right), *_reasons(rows)]


def memory(title: str, rows: Sequence[Row]) -> list[str]:
    """Bytes of parameters by precision, and of what training takes besides."""
    lines = [_head(title, rows)]
    known = next((row.facts for row in rows if row.measured), None)
    if known is not None:
        count, trained = known["parameters"], known["trained"]
        sizes = [[name, _size(count * bits // 8)] for name, bits in BITS.items()]
        lines += [
            "",
            f"{count:,} parameters, {trained:,} of them trained",
            *columns(sizes, [False, True]),
        ]
    table = [["training in", "parameters", "gradients", "optimizer", "together", "peak memory"]]
    for row in rows:
        cells = ["-"] * 5
        if row.measured:
            parts = [row.facts[f"{name}_bytes"] for name in ("parameter", "gradient", "optimizer")]
            cells = [_size(size) for size in (*parts, sum(parts), row.facts["peak_bytes"])]
        table.append([row.shown, *cells])
    return [*lines, "", *columns(table, [False, *(True for _ in range(5))]), *_reasons(rows)]


def as_json(about: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that was measured: bytes, milliseconds per step, samples per second; NaN as a
    string.
    """
    versions = {"loopkit": __version__, "torch": str(torch.__version__)}
    lines = [{"with": dict(row.labels), "note": row.note, **row.facts} for row in rows]
    found: dict[str, Any] = strict({**about, **versions, "rows": lines})
    return found


def _head(title: str, rows: Sequence[Row]) -> str:
    known = next((row.facts for row in rows if row.measured), None)
    if known is None:
        return f"{title}; no run came to its end"
    threads = (
        f", {known['threads']} thread{'s' if known['threads'] > 1 else ''}"
        if known["device"] == "cpu"
        else ""
    )
    return f"{title} on {known['device']}{threads}"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    return (
        f"{size:,} B" if size < 1e4 else f"{size / 1e3:,.1f} kB" if size < 1e6 else megabytes(size)
    )


def _reasons(rows: Sequence[Row]) -> list[str]:
    """Why a row has no numbers, and what to know of those that have."""
    lines = [f"{row.shown}: {cut(row.facts['problem'], WIDTH)}" for row in rows if not row.measured]
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(row.shown)
    lines += [f"{'; '.join(named)}: {note}" for note, named in notes.items()]
    return ["", *lines] if lines else []
