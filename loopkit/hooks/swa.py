"""SWA: stochastic weight averaging, with BatchNorm's statistics computed again at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain, islice
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from loopkit.checkpoint import reading
from loopkit.checks import checked_int, shown
from loopkit.durations import Duration
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.hooks.cadence import cadence_in_steps
from loopkit.hooks.weight_averaging import AveragedParameters, trained_parameters
from loopkit.keywords import checks_keywords
from loopkit.preserve import preserved_modes

if TYPE_CHECKING:
    from loopkit.run import Run


@checks_keywords
class SWA(Hook):
    """Average the weights along the last part of a run with equal weights, and end with the average.

    Stochastic weight averaging (Izmailov et al. 2018) finds flatter minima. When the run ends, the
    task gets the averaged weights. Then one pass of ``train_step`` in training mode without
    gradients computes BatchNorm's statistics of the training data under them, as
    ``torch.optim.swa_utils.update_bn`` does. A run that a signal interrupts keeps its own weights.
    The last checkpoint holds the weights of the last step and the averages, so the run can be
    resumed from it.

    Examples:
        >>> Fit(epochs=20, hooks=[SWA(start="75%", every="1 epoch")]).run(task)

    Args:
        start: the part of the run before the first average: "75%", "10 epochs" or steps.
        every: the cadence of averages after ``start``: "1 epoch", "5%" or steps.
        batches: the number of micro-batches of training data for BatchNorm's statistics; None for
            one epoch.

    Attributes:
        count: how many sets of weights are in the average.

    Raises:
        OptionError: an argument is not accepted.
    """

    may_request = False

    def __init__(
        self,
        start: str | int = "75%",
        every: str | int = "1 epoch",
        batches: int | None = None,
    ) -> None:
        self._start = Duration.parse(start, "SWA(start=)", by_clock=False)
        self._every = Duration.parse(every, "SWA(every=)", by_clock=False)
        self._batches = checked_int(batches, "SWA(batches=)", or_none=True)
        self.count = 0
        self._averages: AveragedParameters | None = None
        self._loaded: Mapping[str, Any] = {}

    def on_setup(self, run: Run) -> None:
        """Find the steps of the averages, and continue with the averages of the checkpoint.

        Raises:
            CheckpointError: the checkpoint's averages are of other parameters.
            OptionError: a duration needs data with a length, the run ends before ``start``, or
                ``Checkpoint(load_best=True)`` would replace the averages.
        """
        self._parameters: dict[str, nn.Parameter] = {}
        if run.loader is None:
            return
        saves = run.options.saves()
        if saves is not None and saves.load_best:
            raise OptionError(
                "SWA and Checkpoint(load_best=True) both decide which weights a run ends with: "
                "drop one"
            )
        self._cadence = cadence_in_steps(self._every, run.length, "SWA(every=)")
        first_step = _first_step(self._start, run)
        self._due = self._cadence.next_step(max(run.progress.step, first_step))
        saved, self._loaded = self._loaded, {}
        self._parameters = trained_parameters(run)
        self._averages = None
        self.count = saved.get("count", 0)
        if self.count:
            with reading(run.record.resumed_from or "", "hooks.SWA"):
                self._averages = AveragedParameters(self._parameters, saved["averages"], "SWA")

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Add the weights to the average, if it is time."""
        if run.progress.step != self._due:
            return
        self._due = self._cadence.next_step(run.progress.step)
        if self._averages is None:
            self._averages = AveragedParameters(self._parameters)
        else:
            self._averages.move(self._parameters, 1 / (self.count + 1))
        self.count += 1

    def on_fit_end(self, run: Run) -> None:
        """Copy the averages into the task, and compute BatchNorm's statistics under them."""
        if self._averages is not None and run.outcome.status != "interrupted":
            self._averages.copy_to(self._parameters)
            update_bn(run, self._batches)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and how many sets of weights are in them."""
        averages = {} if self._averages is None else self._averages.tensors
        return {"count": self.count, "averages": dict(averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a state for ``on_setup``, which moves it to the device."""
        self._loaded = state


def _first_step(start: Duration, run: Run) -> int:
    """Return the step before which nothing is averaged."""
    steps, option = start.in_steps(run.length, "SWA(start=)"), shown("SWA(start=)", str(start))
    if steps is None:
        raise OptionError(f"{option} needs data with a length: give it in steps")
    first = ceil(steps)
    if run.length.steps is not None and first >= run.length.steps:
        raise OptionError(
            f"{option} is step {first}, and the run ends at {run.length.steps}: "
            "nothing would be averaged"
        )
    return first


def update_bn(run: Run, batches: int | None = None) -> None:
    """Compute the running statistics of each BatchNorm layer again: their mean over micro-batches.

    Args:
        run: its training data is read.
        batches: how many micro-batches to read; None for one epoch.
    """
    layers = [m for m in run.task.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers or run.loader is None:
        return
    strategy = run.strategy
    step = strategy.step_fn("train_step")
    with preserved_modes(run.task, strategy.device), _reset_statistics(layers), torch.no_grad():
        run.task.train()
        micro_batches = chain.from_iterable(run.train_loader.open(run.progress.epoch, 0))
        for batch in islice(micro_batches, batches):
            with strategy.forward_context or nullcontext():
                step(batch)


@contextmanager
def _reset_statistics(layers: list[_BatchNorm]) -> Iterator[None]:
    """Reset the running statistics; within the block, they average all batches with equal weight."""
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
