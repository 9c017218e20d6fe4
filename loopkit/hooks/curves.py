"""Curves: the logged values of a run as one picture in the run directory."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from loopkit.errors import LoopkitWarning, missing_extra
from loopkit.events import Hook
from loopkit.files import replacing
from loopkit.keywords import checks_keywords
from loopkit.task import name_of

if TYPE_CHECKING:
    from loopkit.run import Run

# The pause after a drawing, as a multiple of the time that it took.
_PAUSE = 10
_HIDDEN = ("eval/runtime", "eval/samples_per_second")
_COLOURS = ("#1f6feb", "#e36209", "#2da44e", "#8250df", "#cf222e", "#0a7ea4", "#bf8700", "#57606a")


@checks_keywords
class Curves(Hook):
    """Draw losses, metrics, learning rate and gradient norm against the step.

    The picture is drawn after evaluations and at the end, and replaced in one piece. If evaluations
    follow each other so fast that drawing would take more than a tenth of the time, some of them
    are not drawn. matplotlib must be installed (``pip install 'loopkit-torch[plots]'``).

    Examples:
        >>> Fit(hooks=[Curves("curves.svg")]).run(task)

    Args:
        path: of the picture, absolute or within the run directory. Its suffix is the format.
        clock: returns seconds; for tests.
    """

    def __init__(
        self, path: str | Path = "curves.png", clock: Callable[[], float] = perf_counter
    ) -> None:
        self._path = Path(path)
        self._clock = clock
        self._not_before = float("-inf")
        self._failed = False

    def on_setup(self, run: Run) -> None:
        """Check that matplotlib is installed.

        Raises:
            MissingExtraError: it is not.
        """
        if find_spec("matplotlib") is None:
            raise missing_extra("matplotlib", "plots", "Curves")

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Draw, unless the last picture is too recent."""
        if self._clock() >= self._not_before:
            self._draw(run)

    def on_fit_end(self, run: Run) -> None:
        """Draw the whole run."""
        self._draw(run)

    def _draw(self, run: Run) -> None:
        if run.strategy.rank != 0 or run.run_dir is None or self._failed:
            return
        began = self._clock()
        try:
            draw_curves(run.history, run.run_dir / self._path, title=name_of(run.task))
        except OSError as error:
            self._failed = True
            warnings.warn(
                f"Curves cannot write {run.run_dir / self._path} and stops drawing: {error}",
                LoopkitWarning,
                stacklevel=2,
            )
        ended = self._clock()
        self._not_before = ended + _PAUSE * (ended - began)


def draw_curves(rows: Iterable[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw logged values into the picture ``path``. Without values, nothing is drawn.

    Args:
        rows: such as ``{"step": 1, "train/loss": 0.5}``.
        path: its suffix is the format; its folder is made.
        title: a line above the curves.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_extra("matplotlib", "plots", "Curves") from None
    panels = _panels(_series(rows))
    if not panels:
        return
    height = -(-len(panels) // 2)
    last = max(steps[-1] for curves in panels.values() for steps, _ in curves.values())
    figure = Figure(
        figsize=(11 if len(panels) > 1 else 6.5, 3.6 * height), dpi=110, layout="constrained"
    )
    canvas = FigureCanvasAgg(figure)
    for index, (name, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(height, min(2, len(panels)), index)
        _panel(axes, name, curves)
        axes.set_xlim(-0.02 * max(1, last), 1.02 * max(1, last))
    if title:
        figure.suptitle(title, fontweight="bold")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, warnings.catch_warnings():
        # A name may hold characters that the font does not have.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        canvas.print_figure(temporary)


Series = dict[str, tuple[list[float], list[float]]]


def _series(rows: Iterable[Mapping[str, Any]]) -> Series:
    """Return the steps and values of each logged name."""
    found: Series = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)):
                steps, values = found.setdefault(name, ([], []))
                steps.append(row["step"])
                values.append(value)
    return found


def _panels(series: Series) -> dict[str, Series]:
    """Return the curves by panel, without empty panels."""
    panels: dict[str, Series] = {
        "Loss": {},
        "Metrics": {},
        "Learning rate": {},
        "Gradient norm": {},
    }
    for name, curve in series.items():
        if name == "train/loss" or (name.startswith("eval/") and name.endswith("/loss")):
            panels["Loss"][name] = curve
        elif name.startswith("eval/") and name not in _HIDDEN:
            panels["Metrics"][name] = curve
        elif name == "lr" or name.startswith("lr/"):
            panels["Learning rate"][name] = curve
        elif name == "train/grad_norm":
            panels["Gradient norm"][name] = curve
    return {name: curves for name, curves in panels.items() if curves}


def _panel(axes: Any, name: str, curves: Series) -> None:
    for index, (label, (steps, values)) in enumerate(curves.items()):
        few = len(steps) <= 40
        # A leading underscore would hide the label, and a dollar sign would start a formula.
        shown = label.lstrip("_").replace("$", r"\$")
        axes.plot(
            steps,
            values,
            label=shown,
            color=_COLOURS[index % len(_COLOURS)],
            linewidth=1.6,
            marker="o" if few else None,
            markersize=3.5,
        )
    axes.set_title(name, fontsize=11, loc="left")
    axes.set_xlabel("step")
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:g}")
    if name in ("Learning rate", "Gradient norm"):
        axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(curves) > 1 or name in ("Loss", "Metrics"):
        axes.legend(frameon=False, fontsize=9)
