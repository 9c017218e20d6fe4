"""A plan as a picture: a bar for the plan and for each way to save memory, by what memory is for."""

from __future__ import annotations

from pathlib import Path

from loopkit.cli.bench.plot import save
from loopkit.cli.plan.plan_tables import Plan
from loopkit.plan.timeline import KINDS

COLOURS = ("#1f6feb", "#e36209", "#2da44e", "#8250df", "#bf8700", "#6e7781")


def draw(plan: Plan, path: Path) -> None:
    """Draw the plan.

    Raises:
        RunDirError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    bars = {"as planned": plan.peak}
    bars.update({each.typed: each.peak for each in plan.savings if each.peak is not None})
    names = list(bars)[::-1]  # the first one at the top
    figure = Figure(figsize=(9, 1.6 + 0.4 * len(bars)), dpi=110, layout="constrained")  # inches
    axes = figure.add_subplot()
    left = [0.0] * len(names)
    for kind, colour in zip(KINDS, COLOURS):
        sizes = [bars[name].bytes[kind] / 1e9 for name in names]
        if any(sizes):
            axes.barh(names, sizes, left=left, color=colour, label=kind)
        left = [before + size for before, size in zip(left, sizes)]
    if plan.card is not None:
        axes.axvline(plan.card / 1e9, color="#cf222e", linestyle="--", label="the card")
    axes.set_xlabel("GB on each rank, at the peak of a step")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, fontsize=8)
    figure.suptitle(plan.title, fontsize=10, fontweight="bold")
    save(figure, path)
