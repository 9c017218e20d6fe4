"""What ``loopkit bench`` measured, as a picture; matplotlib is imported when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopkit.cli.bench.tables import Row
from loopkit.errors import OptionError, RunDirError, missing_extra, nearest
from loopkit.files import replacing

_COLOURS = ("#1f6feb", "#e36209", "#2da44e")
_PARTS = {
    "parameters": "parameter_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
}


def check(path: Path) -> None:
    """Say, before anything is measured, that a picture cannot be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: the ending is no format that it writes.
    """
    kinds = sorted(_canvas(None).get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise OptionError(
            f"--picture {path}: the ending says the format, one of {', '.join(kinds)}."
            f"{nearest(path.suffix.removeprefix('.'), kinds)}"
        )


def draw(kind: str, title: str, rows: Sequence[Row], path: Path) -> None:
    """Draw the runs that came to their end as bars: time and memory, or for "memory" what the bytes
    are of.

    Raises:
        RunDirError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    held = [row for row in rows if row.measured][::-1]  # the first at the top
    panels = _memory(held) if kind == "memory" else _speed(held)
    figure = Figure(
        figsize=(5.5 * len(panels), 1.4 + 0.4 * max(1, len(held))), dpi=110, layout="constrained"
    )
    for place, (name, series) in enumerate(panels.items(), 1):
        _panel(figure.add_subplot(1, len(panels), place), name, [row.shown for row in held], series)
    figure.suptitle(title.replace("$", r"\$"), fontweight="bold")
    try:
        with replacing(path) as temporary:
            _canvas(figure).print_figure(temporary)
    except OSError as error:
        raise RunDirError(f"--picture {path} cannot be written: {error.strerror}") from error


Series = Mapping[str, list[float]]


def _speed(rows: Sequence[Row]) -> dict[str, Series]:
    panels: dict[str, Series] = {
        "milliseconds per step": {"": [row.facts["step_ms"] for row in rows]}
    }
    if all(row.facts["peak_bytes"] is not None for row in rows):
        panels["peak memory in MB"] = {"": [row.facts["peak_bytes"] / 1e6 for row in rows]}
    return panels


def _memory(rows: Sequence[Row]) -> dict[str, Series]:
    return {"MB": {name: [row.facts[key] / 1e6 for row in rows] for name, key in _PARTS.items()}}


def _panel(axes: Any, name: str, labels: Sequence[str], series: Series) -> None:
    """Horizontal bars, those of several series one after the other."""
    ends = [0.0] * len(labels)
    for place, (label, values) in enumerate(series.items()):
        bars = axes.barh(
            range(len(labels)),
            values,
            left=ends,
            label=label or None,
            color=_COLOURS[place],
            height=0.65,
        )
        if len(series) == 1:
            axes.bar_label(bars, fmt="{:,.3g}", padding=3, fontsize=9)
        ends = [end + value for end, value in zip(ends, values)]
    axes.set_yticks(range(len(labels)), [label.replace("$", r"\$") for label in labels])
    axes.set_title(name, fontsize=11, loc="left")
    axes.margins(x=0.15)
    axes.grid(True, axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)


def _canvas(figure: Any) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plots", "--picture") from None
    return FigureCanvasAgg(figure or Figure())
