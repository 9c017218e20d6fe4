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
    """Trains a few steps while the rate grows from ``low`` to ``high``, notes the loss at each, and
    goes back.

    The test of Smith (2017), before the first step of a new run (a resumed one is left alone).
    Afterwards
    weights, buffers, optimizers, random streams and data are as before: what follows is the run it
    would have been. The rates and losses go to ``find_lr.csv`` in the run directory, and to
    ``find_lr.png`` where matplotlib is installed. The test is over when the smoothed loss is four
    times its lowest, or not finite.

    Args:
        low, high: the first and the last rate. The groups of an optimizer keep their ratio to the
            first.
        steps: optimizer steps from one to the other, growing by the same factor each time.
        stop: end the run after the test; False trains on, at the rates the task gave.

    Attributes:
        rows: (rate, loss, smoothed loss) for each step.
        suggestion: the rate at which the smoothed loss falls fastest; None where it never fell.

    Raises:
        OptionError: an argument that is not accepted.
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
            OptionError: the data can be read only once, or the optimizer cannot be put back.
        """
        if run.progress.step or run.record.resumed_from is not None:
            return
        if not run.strategy.exposes_gradients:
            raise OptionError(
                f"FindLR puts the optimizer back as it was, and {type(run.strategy).__name__} "
                f"keeps its "
                "state in flat parts: run FindLR under strategy='ddp' or 'fsdp'"
            )
        source: Any = run.train_loader.source if run.loader is not None else None
        if hasattr(source, "batches") and iter(source.batches) is source.batches:
            kind = type(source.batches).__name__
            raise OptionError(
                f"FindLR reads training data that the run needs afterwards, and a {kind} can be "
                f"read "
                "once: give an iterable that starts anew at each iter()"
            )
        with preserved(run) as trial:
            self.rows = _smoothed(_sweep(trial, self._rates))
        self.suggestion = steepest(self.rows)
        if run.strategy.rank == 0:
            self._report(run)
        if self._stop:
            run.end("stopped", f"FindLR: {self._found()}", agreed=True)

    def table(self, lines: int = 12) -> str:
        """About ``lines`` of the rows, evenly spread, as text."""
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
        print(f"{self.table()}\nFindLR: {self._found()}", file=sys.stderr)
        if run.run_dir is not None:
            lines = ["rate,loss,smoothed", *(",".join(map(repr, row)) for row in self.rows)]
            (run.run_dir / "find_lr.csv").write_text("\n".join(lines) + "\n")
            if find_spec("matplotlib") is not None and self.rows:
                _draw(self.rows, self.suggestion, run.run_dir / "find_lr.png")


def steepest(rows: list[tuple[float, float, float]]) -> float | None:
    """The rate at which the smoothed loss falls fastest against the rate's logarithm; None where it
    never falls.
    """
    best, found = 0.0, None
    for (low, _, before), (rate, _, _), (high, _, after) in zip(rows, rows[1:], rows[2:]):
        slope = (after - before) / math.log(high / low)
        if slope < best:
            best, found = slope, rate
    return found


def _sweep(run: Run, rates: list[float]) -> Iterator[tuple[float, float]]:
    """(rate, loss) of one step at each rate, until a loss is not finite."""
    bases = {
        name: [float(group["lr"]) for group in o.param_groups] for name, o in run.optimizers.items()
    }
    groups = _endless(run)
    for rate in rates:
        for name, optimizer in run.optimizers.items():
            for group, base in zip(optimizer.param_groups, bases[name]):
                group["lr"] = rate * (base / bases[name][0] if bases[name][0] else 1.0)
        run.loops.step.run(run, next(groups))
        run.strategy.finish_step()
        run.progress.step += 1
        loss = run.accumulator.take().get("train/loss", math.nan)
        if not math.isfinite(loss):
            return
        yield rate, loss


def _endless(run: Run) -> Iterator[MicroBatches]:
    epoch = 0
    while True:
        yield from run.train_loader.open(epoch, 0)
        epoch += 1


def _smoothed(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """With an exponential average, corrected for its start, up to where that has reached four times
    its lowest.
    """
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
    canvas.print_figure(path)
