"""The model summary as a rich table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from loopkit.console.summary import ModelSummary


def model_table(summary: ModelSummary) -> RenderableType:
    """What ``rich.print(summary)`` shows."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, right in summary.header():
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in summary.cells():
        table.add_row(*row)
    return Group(table, f"\n{summary.totals}")
