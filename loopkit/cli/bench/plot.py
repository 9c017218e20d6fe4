"""The results of ``loopkit bench`` as a picture; matplotlib is imported only for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from loopkit.cli.bench.tables import Row
from loopkit.errors import OptionError, RunDirError, missing_extra, nearest
from loopkit.files import replacing

COLOURS = ("#1f6feb", "#e36209", "#2da44e")
BYTES = {
    "parameters": "parameter_bytes",
    "gradients": "gradient_bytes",
    "optimizer": "optimizer_bytes",
}
Series: TypeAlias = Mapping[str, list[float]]  # a value for each run, by the name of the series


def check(path: Path) -> None:
    """Check, before anything is measured, that a picture can be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OptionError: matplotlib does not write the format of the file's ending.
    """
    kinds = sorted(_canvas(None).get_supported_filetypes())
    ending = path.suffix.removeprefix(".").lower()
    if ending not in kinds:
        known = ", ".join(kinds)
        hint = nearest(ending, kinds)
        raise OptionError(f"--picture {path}: the ending says the format, one of {known}.{hint}")


def draw(kind: str, title: str, rows: Sequence[Row], path: Path) -> None:
    """Draw the completed runs as bars.

    Args:
        kind: "memory" draws the bytes of each part; any other kind draws time and peak memory.

    Raises:
        RunDirError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    measured = [row for row in rows if row.measured][::-1]  # the first run at the top
    panels = _memory(measured) if kind == "memory" else _speed(measured)
    size = (5.5 * len(panels), 1.4 + 0.4 * max(1, len(measured)))  # inches
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for number, (name, series) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        _panel(axes, name, [row.title for row in measured], series)
    figure.suptitle(_plain(title), fontweight="bold")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib to a file, in one piece.

    Raises:
        RunDirError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            _canvas(figure).print_figure(temporary)
    except OSError as error:
        raise RunDirError(f"--picture {path} cannot be written: {error.strerror}") from error


def _speed(rows: Sequence[Row]) -> dict[str, Series]:
    panels: dict[str, Series] = {
        "milliseconds per step": {"": [row.facts["step_ms"] for row in rows]}
    }
    if all(row.facts["peak_bytes"] is not None for row in rows):
        panels["peak memory in MB"] = {"": [row.facts["peak_bytes"] / 1e6 for row in rows]}
    return panels


def _memory(rows: Sequence[Row]) -> dict[str, Series]:
    return {"MB": {name: [row.facts[key] / 1e6 for row in rows] for name, key in BYTES.items()}}


def _panel(axes: Any, name: str, labels: Sequence[str], series: Series) -> None:
    """Draw horizontal bars; several series are stacked."""
    ends = [0.0] * len(labels)
    for colour, (label, values) in zip(COLOURS, series.items()):
        bars = axes.barh(
            range(len(labels)), values, left=ends, label=label or None, color=colour, height=0.65
        )
        if len(series) == 1:
            axes.bar_label(bars, fmt="{:,.3g}", padding=3, fontsize=9)
        ends = [end + value for end, value in zip(ends, values)]
    axes.set_yticks(range(len(labels)), [_plain(label) for label in labels])
    axes.set_title(name, fontsize=11, loc="left")
    axes.margins(x=0.15)
    axes.grid(True, axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=9)


def _plain(text: str) -> str:
    """Return the text so that matplotlib finds no formula in it."""
    return text.replace("$", r"\$")


def _canvas(figure: Any) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plots", "--picture") from None
    return FigureCanvasAgg(figure or Figure())
