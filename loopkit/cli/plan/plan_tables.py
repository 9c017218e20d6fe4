"""A plan as text with bars, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from loopkit.console.text import byte_size, columns, cut
from loopkit.plan.cards import RESERVED, usable
from loopkit.plan.savings import Saving
from loopkit.plan.timeline import Peak

_BAR = 32  # cells
_LONGEST_REASON = 100


@dataclass
class Plan:
    """What ``loopkit plan`` found.

    Attributes:
        title: the task and the options that matter.
        peak: the peak of a step on each rank.
        notes: what the plan leaves out.
        card: the bytes of the card; None without one.
        largest: the most samples of a micro-batch that fit the card; 0 if none do.
        savings: what each way to save memory would save.
    """

    title: str
    peak: Peak
    notes: Sequence[str] = ()
    card: int | None = None
    largest: int | None = None
    savings: Sequence[Saving] = field(default_factory=list)

    @property
    def fits(self) -> bool:
        """Whether the plan fits the card; True without one."""
        return self.card is None or self.peak.total <= usable(self.card)


def as_text(plan: Plan) -> list[str]:
    """Return the plan as lines."""
    lines = [plan.title, "", *_parts(plan.peak)]
    if plan.card is not None:
        lines += ["", _card_line(plan, plan.card)]
    if plan.savings:
        lines += ["", *_savings(plan)]
    return lines + ([""] if plan.notes else []) + [f"Note: {note}." for note in plan.notes]


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values; sizes are bytes."""
    return {
        "plan": plan.title,
        "peak": plan.peak.total,
        "parts": dict(plan.peak.bytes),
        "host": plan.peak.host,
        "card": plan.card,
        "fits": plan.fits,
        "largest_batch": plan.largest,
        "savings": [
            {
                "name": each.name,
                "options": each.typed,
                "peak": None if each.peak is None else each.peak.total,
                "reason": each.reason,
            }
            for each in plan.savings
        ],
        "notes": list(plan.notes),
    }


def _parts(peak: Peak) -> list[str]:
    total = max(peak.total, 1)
    rows = [
        (kind, byte_size(size), f"{size / total:.0%}", _bar(size / total))
        for kind, size in peak.bytes.items()
    ]
    rows.append(("peak of a step", byte_size(peak.total), "", ""))
    if peak.host:
        rows.append(("in the host's memory", byte_size(peak.host), "", ""))
    return columns(rows, (False, True, True, False))


def _card_line(plan: Plan, card: int) -> str:
    said = "fits" if plan.fits else "does not fit"
    line = (
        f"A card of {byte_size(card)} has {byte_size(usable(card))} for tensors, as {RESERVED:.0%} "
        f"are kept for the rest: this {said}. "
    )
    if not plan.largest:
        return line + "No micro-batch does, not even one of a single sample"
    return line + f"The largest micro-batch that fits has {plan.largest} samples"


def _savings(plan: Plan) -> list[str]:
    now = max(plan.peak.total, 1)
    rows = [("to save memory", "type", "peak", "saved", "")]
    for each in plan.savings:
        if each.peak is not None:
            peak = each.peak.total
            share = _bar(min(peak / now, 1.0))
            rows.append((each.name, each.typed, byte_size(peak), f"{1 - peak / now:.0%}", share))
        else:
            rows.append((each.name, each.typed, "-", "-", cut(each.reason, _LONGEST_REASON)))
    return columns(rows, (False, False, True, True, False))


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
