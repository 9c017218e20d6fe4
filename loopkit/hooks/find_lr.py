"""FindLR: the learning-rate range test."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopkit.checks import checked_int
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.files import replacing
from loopkit.fit.state import preserved
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.data.micro_batches import MicroBatches
    from loopkit.run import Run

_SMOOTHING = 0.9
_DIVERGED = 4.0
_FEWEST = 10


@checks_keywords
class FindLR(Hook):
    """Train a few steps with a growing learning rate, note the loss of each, and restore the run.

    This is the learning-rate range test of Smith (2017). It happens before the first step of a new
    run, and not in a resumed one. It ends when the smoothed loss is four times its lowest value, or
    is not finite. Afterwards weights, buffers, optimizers, random state and data are as before, so
    the run that follows is the same as without the test. The rates and losses are written to
    ``find_lr.csv`` in the run directory, and drawn in ``find_lr.png`` if matplotlib is installed.

    Examples:
        >>> finder = FindLR(low=1e-6, high=1.0)
        >>> Fit(hooks=[finder]).run(task)
        >>> finder.suggestion

    Args:
        low: the first learning rate.
        high: the last learning rate. The other groups of an optimizer keep their ratio to the first
            group's rate.
        steps: optimizer steps from ``low`` to ``high``; the rate grows by the same factor each time.
        stop: end the run after the test. False trains on, at the task's own rates.

    Attributes:
        rows: (rate, loss, smoothed loss) of each step.
        suggestion: the rate at which the smoothed loss falls fastest; None if it never fell.

    Raises:
        OptionError: an argument is not accepted.
    """

    def __init__(
        self, low: float = 1e-7, high: float = 1.0, steps: int = 100, stop: bool = True
    ) -> None:
        if not all(isinstance(rate, (int, float)) for rate in (low, high)) or not 0 < low < high:
            raise OptionError(
                f"FindLR(low={low!r}, high={high!r}): give two rates above 0, the lower one first"
            )
        checked_int(steps, "FindLR(steps=)", at_least=_FEWEST)
        self._rates = [low * (high / low) ** (index / (steps - 1)) for index in range(steps)]
        self._stop = stop
        self.rows: list[tuple[float, float, float]] = []
        self.suggestion: float | None = None

    def on_fit_start(self, run: Run) -> None:
        """Do the test.

        Raises:
            OptionError: the data can be read only once, or the optimizer cannot be restored.
        """
        if run.progress.step or run.record.resumed_from is not None:
            return
        if not run.strategy.exposes_gradients:
            raise OptionError(
                f"FindLR restores the optimizer, and {type(run.strategy).__name__} keeps its state "
                "in flat parts: run FindLR under strategy='ddp' or 'fsdp'"
            )
        source: Any = run.train_loader.source if run.loader is not None else None
        if hasattr(source, "batches") and iter(source.batches) is source.batches:
            kind = type(source.batches).__name__
            raise OptionError(
                "FindLR reads training data that the run needs afterwards, and "
                f"a {kind} can be read once: give an iterable that starts again at each iter()"
            )
        with preserved(run) as trial:
            self.rows = _smoothed(_sweep(trial, self._rates))
        self.suggestion = steepest(self.rows)
        if run.strategy.rank == 0:
            self._report(run)
        if self._stop:
            run.end("stopped", f"FindLR: {self._found()}", agreed=True)

    def table(self, lines: int = 12) -> str:
        """Return about ``lines`` of the rows as text, evenly spaced."""
        every = max(1, len(self.rows) // lines)
        shown = [
            f"{rate:>10.2e}  {loss:>10.4f}  {smooth:>10.4f}"
            for rate, loss, smooth in self.rows[::every]
        ]
        return "\n".join([f"{'rate':>10}  {'loss':>10}  {'smoothed':>10}", *shown])

    def _found(self) -> str:
        if self.suggestion is None:
            return "the loss never fell: try a lower low=, more steps=, or look at the data"
        return f"the loss falls fastest at a learning rate of {self.suggestion:.2g}"

    def _report(self, run: Run) -> None:
        """Print the table, and write the files."""
        print(f"{self.table()}\nFindLR: {self._found()}", file=sys.stderr)
        if run.run_dir is not None:
            lines = ["rate,loss,smoothed", *(",".join(map(repr, row)) for row in self.rows)]
            (run.run_dir / "find_lr.csv").write_text("\n".join(lines) + "\n")
            if find_spec("matplotlib") is not None and self.rows:
                _draw(self.rows, self.suggestion, run.run_dir / "find_lr.png")


def steepest(rows: list[tuple[float, float, float]]) -> float | None:
    """Return the rate at which the smoothed loss falls fastest against the logarithm of the rate.

    Args:
        rows: (rate, loss, smoothed loss).

    Returns:
        None if the smoothed loss never falls.
    """
    best, found = 0.0, None
    for (low, _, before), (rate, _, _), (high, _, after) in zip(rows, rows[1:], rows[2:]):
        slope = (after - before) / math.log(high / low)
        if slope < best:
            best, found = slope, rate
    return found


def _sweep(run: Run, rates: list[float]) -> Iterator[tuple[float, float]]:
    """Yield the rate and the loss of one step at each rate, until a loss is not finite."""
    bases = {
        name: [float(group["lr"]) for group in o.param_groups] for name, o in run.optimizers.items()
    }
    steps = _endless(run)
    for rate in rates:
        for name, optimizer in run.optimizers.items():
            for group, base in zip(optimizer.param_groups, bases[name]):
                group["lr"] = rate * (base / bases[name][0] if bases[name][0] else 1.0)
        run.loops.step.run(run, next(steps))
        run.strategy.finish_step()
        run.progress.step += 1
        loss = run.accumulator.take().get("train/loss", math.nan)
        if not math.isfinite(loss):
            return
        yield rate, loss


def _endless(run: Run) -> Iterator[MicroBatches]:
    """Yield the micro-batches of one step after another, over as many epochs as are asked for."""
    epoch = 0
    while True:
        yield from run.train_loader.open(epoch, 0)
        epoch += 1


def _smoothed(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """Add an exponential average with bias correction; stop when it is four times its lowest."""
    rows: list[tuple[float, float, float]] = []
    average = 0.0
    for count, (rate, loss) in enumerate(pairs, 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smooth = average / (1 - _SMOOTHING**count)
        rows.append((rate, loss, smooth))
        lowest = min(row[2] for row in rows)
        if smooth - lowest > (_DIVERGED - 1) * abs(lowest):
            break
    return rows


def _draw(rows: list[tuple[float, float, float]], suggestion: float | None, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 3.8), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rates = [row[0] for row in rows]
    axes.plot(rates, [row[1] for row in rows], color="#8c959f", linewidth=1, label="loss")
    axes.plot(rates, [row[2] for row in rows], color="#1f6feb", linewidth=1.8, label="smoothed")
    if suggestion is not None:
        axes.axvline(
            suggestion, color="#e36209", linestyle="--", label=f"fastest fall: {suggestion:.2g}"
        )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.grid(True, alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    with replacing(path) as temporary:
        canvas.print_figure(temporary)
