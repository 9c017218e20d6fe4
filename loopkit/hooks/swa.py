"""SWA: stochastic weight averaging, with BatchNorm's statistics measured anew at the end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from loopkit import rng
from loopkit.checks import checked_int
from loopkit.durations import Cadence, Duration
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.hooks.weight_averaging import AveragedParameters, trained_parameters
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run

Every = str | int


@checks_keywords
class SWA(Hook):
    """Averages the weights along the last part of a run, all alike (Izmailov et al. 2018), and ends
    with them.

    When the run is over the task gets the averaged weights, and BatchNorm layers the statistics of
    the training data under them, as ``torch.optim.swa_utils.update_bn`` measures them: one pass of
    ``train_step`` in training mode without gradients. An interrupted run is left as it is. The last
    checkpoint holds the weights of the last step, with the averages beside them, so that the run
    can be resumed from it.

    Args:
        start: how much of the run comes before the first average: "75%", "10 epochs" or steps.
        every: the cadence of averages after that: "1 epoch", "5%" or steps.
        batches: micro-batches of training data that BatchNorm's statistics are measured on; None
            for an epoch.

    Attributes:
        count: how many sets of weights are averaged so far.

    Raises:
        OptionError: an argument that is not accepted.
    """

    may_request = False

    def __init__(
        self, start: Every = "75%", every: Every = "1 epoch", batches: int | None = None
    ) -> None:
        self._start = Duration.parse(start, "SWA(start=)", by_clock=False)
        self._every = Duration.parse(every, "SWA(every=)", by_clock=False)
        self._batches = checked_int(batches, "SWA(batches=)", or_none=True)
        self.count = 0
        self._averages: AveragedParameters | None = None
        self._loaded: Mapping[str, Any] | None = None

    def on_setup(self, run: Run) -> None:
        """Work out the steps, and go on from the averages of the checkpoint.

        Raises:
            CheckpointError: the checkpoint's averages are of other parameters.
            OptionError: a duration needs a length the run has not, or the averages would not stay
                in the task.
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
        first = self._start.in_steps(run.length, "SWA(start=)")
        self._cadence = Cadence(self._every, run.length, "SWA(every=)")
        if first is None or not self._cadence.counts_steps:
            raise OptionError(
                f"SWA(start='{self._start}', every='{self._every}') needs data with a length: give "
                f"both "
                "in steps"
            )
        first_step = ceil(first)
        if run.length.steps is not None and first_step >= run.length.steps:
            raise OptionError(
                f"SWA(start='{self._start}') is step {first_step}, and the run ends at "
                f"{run.length.steps}: nothing would be averaged"
            )
        self._due = self._cadence.next_step(max(run.progress.step, first_step))
        saved, self._loaded = self._loaded or {}, None
        self._parameters = trained_parameters(run)
        self.count = saved.get("count", 0)
        self._averages = (
            AveragedParameters(self._parameters, saved["averages"], "SWA") if self.count else None
        )

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Take the weights into the average."""
        if run.progress.step != self._due:
            return
        self._due = self._cadence.next_step(run.progress.step)
        if self._averages is None:
            self._averages = AveragedParameters(self._parameters)
        else:
            self._averages.move(self._parameters, 1 / (self.count + 1))
        self.count += 1

    def on_fit_end(self, run: Run) -> None:
        """Give the task the averages, and its BatchNorm layers their statistics."""
        if self._averages is not None and run.outcome.status != "interrupted":
            self._averages.copy_to(self._parameters)
            update_statistics(run, self._batches)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how many sets of weights they are of."""
        averages = {} if self._averages is None else self._averages.tensors
        return {"count": self.count, "averages": dict(averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; ``on_setup`` brings it to the device."""
        self._loaded = state


def update_statistics(run: Run, batches: int | None = None) -> None:
    """Measure the running mean and variance of each BatchNorm layer anew: the plain average over
    micro-batches.

    Args:
        batches: how many micro-batches of training data to take; None for one epoch.
    """
    layers = [m for m in run.task.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers or run.loader is None:
        return
    strategy, streams = run.strategy, rng.get_state(run.strategy.device)
    step, modes = strategy.step_fn("train_step"), [(m, m.training) for m in run.task.modules()]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average, all batches alike
    run.task.train()
    try:
        with torch.no_grad():
            groups = run.train_loader.open(run.progress.epoch, 0)
            for batch in islice((batch for group in groups for batch in group), batches):
                with strategy.forward_context or nullcontext():
                    step(batch)
    finally:
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
        for module, training in modes:
            module.training = training
        rng.set_state(streams, strategy.device)
