"""The results of ``loopkit bench`` as tables and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from loopkit.cli.evaluate import to_json
from loopkit.console.text import byte_size, columns, cut, number
from loopkit.version import __version__

# Bits of a parameter. Quantisation to 8 or 4 bits also keeps a scale for each block, not counted.
BITS = {"fp32": 32, "bf16": 16, "int8": 8, "4-bit": 4}
LONGEST_REASON = 100


@dataclass(frozen=True)
class Row:
    """The results of one run.

    Attributes:
        labels: the values that this run was given, by name.
        facts: see ``worker.measure``.
        note: a remark about the numbers, shown below the table.
    """

    labels: Mapping[str, str]
    facts: Mapping[str, Any]
    note: str = ""

    @property
    def measured(self) -> bool:
        """Whether the run completed."""
        return self.facts["problem"] is None

    @property
    def title(self) -> str:
        """The labels on one line."""
        if len(self.labels) == 1:
            return next(iter(self.labels.values()))
        return ", ".join(f"{name}={value}" for name, value in self.labels.items())


def speed(title: str, rows: Sequence[Row]) -> list[str]:
    """Return a table of time, throughput, peak memory and loss."""
    names = list(rows[0].labels)
    table = [[*names, "ms/step", "samples/s", "peak memory", "loss"]]
    for row in rows:
        cells = ["-"] * 4
        if row.measured:
            facts = row.facts
            cells = [
                f"{facts['step_ms']:,.2f}",
                f"{facts['samples_per_second']:,.0f}",
                _size(facts["peak_bytes"]),
                "-" if facts["loss"] is None else number(facts["loss"]),
            ]
        table.append([*row.labels.values(), *cells])
    right = [*(False for _ in names), True, True, True, True]
    return [_head(title, rows), "", *columns(table, right), *_remarks(rows)]


def memory(title: str, rows: Sequence[Row]) -> list[str]:
    """Return tables of the parameters' bytes by precision, and of the bytes in training."""
    lines = [_head(title, rows)]
    known = _first_facts(rows)
    if known is not None:
        count, trained = known["parameters"], known["trained"]
        lines += ["", f"{count:,} parameters, {trained:,} of them trained"]
        sizes = [[name, _size(count * bits // 8)] for name, bits in BITS.items()]
        lines += columns(sizes, [False, True])
    table = [["training in", "parameters", "gradients", "optimizer", "together", "peak memory"]]
    for row in rows:
        cells = ["-"] * 5
        if row.measured:
            parts = [row.facts[f"{name}_bytes"] for name in ("parameter", "gradient", "optimizer")]
            cells = [_size(size) for size in (*parts, sum(parts), row.facts["peak_bytes"])]
        table.append([row.title, *cells])
    return [*lines, "", *columns(table, [False, *(True for _ in range(5))]), *_remarks(rows)]


def as_json(about: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Return all measured values: bytes, milliseconds, samples per second; NaN as a string."""
    versions = {"loopkit": __version__, "torch": str(torch.__version__)}
    lines = [{"with": dict(row.labels), "note": row.note, **row.facts} for row in rows]
    found: dict[str, Any] = to_json({**about, **versions, "rows": lines})
    return found


def _first_facts(rows: Sequence[Row]) -> Mapping[str, Any] | None:
    return next((row.facts for row in rows if row.measured), None)


def _head(title: str, rows: Sequence[Row]) -> str:
    known = _first_facts(rows)
    if known is None:
        return f"{title}; no run completed"
    device, threads = known["device"], known["threads"]
    if device != "cpu":
        return f"{title} on {device}"
    return f"{title} on cpu, {threads} thread{'s' if threads > 1 else ''}"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    if size < 1e4:
        return f"{size:,} B"
    return byte_size(size)


def _remarks(rows: Sequence[Row]) -> list[str]:
    """Return the reasons of runs that failed, and the notes of those that completed."""
    lines = [
        f"{row.title}: {cut(row.facts['problem'], LONGEST_REASON)}"
        for row in rows
        if not row.measured
    ]
    notes: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            notes.setdefault(row.note, []).append(row.title)
    lines += [f"{'; '.join(titles)}: {note}" for note, titles in notes.items()]
    return ["", *lines] if lines else []
