"""EMA: an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loopkit.checkpoint import load_snapshot
from loopkit.durations import Cadence, Duration
from loopkit.errors import CheckpointError, OptionError
from loopkit.events import Hook
from loopkit.hooks.weight_averaging import AveragedParameters, trained_parameters
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run

Every = str | int


@checks_keywords
class EMA(Hook):
    """Keeps ``average = decay * average + (1 - decay) * weights`` of all trained parameters, on
    their device.

    Evaluations of the run measure the averaged weights; training goes on with its own. Buffers
    (BatchNorm's statistics) are not averaged: the latest ones go with the averages. Checkpoints
    keep both sets of weights.

    Args:
        decay: how much of the average stays at each update, between 0 and 1.
        every: steps between updates; also "1 epoch" or "1%", where the length of the data is known.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` at update n, so that the average forgets the
            first weights soon (as TensorFlow's ExponentialMovingAverage does with num_updates).
        evaluate: evaluate under the averaged weights.
        apply_at_end: leave the averaged weights in the task when the run is over (those of the best
            checkpoint under ``Checkpoint(load_best=True)``), unless a signal interrupted it.

    Raises:
        OptionError: an argument that is not accepted.
    """

    may_request = False

    def __init__(
        self,
        decay: float = 0.999,
        every: Every = 1,
        warmup: bool = False,
        evaluate: bool = True,
        apply_at_end: bool = False,
    ) -> None:
        if not isinstance(decay, (int, float)) or not 0 < decay < 1:
            raise OptionError(f"EMA(decay={decay!r}): give a number between 0 and 1, such as 0.999")
        self._every = Duration.parse(every, "EMA(every=)")
        if self._every.unit not in ("step", "epoch", "percent"):
            raise OptionError(
                f"EMA(every={every!r}): give steps, epochs or a percentage of the run"
            )
        self.decay, self.warmup, self.evaluate, self.apply_at_end = (
            decay,
            warmup,
            evaluate,
            apply_at_end,
        )
        self.updates = 0
        self._averages: AveragedParameters | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._live: dict[str, Tensor] | None = None
        self._loaded: Mapping[str, Any] | None = None

    def on_setup(self, run: Run) -> None:
        """Start from the weights as they are, or go on from the averages of the checkpoint.

        Raises:
            CheckpointError: the checkpoint's averages are of other parameters.
            OptionError: ``every`` needs data with a length.
        """
        self._parameters = {}
        if run.loader is None:
            return  # nothing is trained: what was averaged before stays
        self._cadence = Cadence(self._every, run.length, "EMA(every=)")
        if not self._cadence.counts_steps:
            raise OptionError(
                f"EMA(every='{self._every}') needs data with a length: give it in steps"
            )
        self._due = self._cadence.next_step(run.progress.step)
        saved, self._loaded, self._live = self._loaded or {}, None, None
        self._parameters = trained_parameters(run)
        self._averages = AveragedParameters(self._parameters, saved.get("averages"), "EMA")
        self.updates = saved.get("updates", 0)

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Move the averages towards the weights."""
        if self._averages is None or run.progress.step != self._due:
            return
        self._due = self._cadence.next_step(run.progress.step)
        decay = (
            min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        )
        self._averages.move(self._parameters, 1 - decay)
        self.updates += 1

    def on_eval_start(self, run: Run) -> None:
        """Put the averages in the weights' place."""
        if self.evaluate and self._parameters and self._averages is not None:
            self._live = {name: p.detach().clone() for name, p in self._parameters.items()}
            self._averages.copy_to(self._parameters)

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Put the weights back, bit for bit."""
        self._swap_back()

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Put the weights back where an evaluation broke off."""
        self._swap_back()

    def on_fit_end(self, run: Run) -> None:
        """Leave the averages in the task, if asked to."""
        if not self.apply_at_end or run.outcome.status == "interrupted":
            return
        saves = run.options.saves()
        best = run.record.best.get("checkpoint") if saves is not None and saves.load_best else None
        self.apply(run.task, best)

    def apply(self, task: nn.Module, checkpoint: str | Path | None = None) -> None:
        """Give ``task`` the averaged weights: the present ones, or those that ``checkpoint`` holds.

        Raises:
            CheckpointError: there are none, or they are of other parameters.
        """
        parameters = dict(task.named_parameters())
        averages = self._averages
        if checkpoint is not None:
            hooks = load_snapshot(Path(checkpoint)).state.get("hooks", {})
            saved = hooks.get(type(self).__name__, {}).get("averages")
            if saved is None:
                raise CheckpointError(
                    f"{checkpoint} holds no averages of an EMA: it was saved without one"
                )
            averages = AveragedParameters(
                {n: p for n, p in parameters.items() if n in saved}, saved, "EMA"
            )
        if averages is None:
            raise CheckpointError(
                "this EMA has averaged nothing yet: run a task with it, or name a checkpoint"
            )
        averages.copy_to(parameters)

    def state_dict(self) -> dict[str, Any]:
        """The averages and how often they were updated."""
        averages = {} if self._averages is None else self._averages.tensors
        return {"updates": self.updates, "averages": dict(averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; ``on_setup`` brings it to the device."""
        self._loaded = state

    @torch.no_grad()
    def _swap_back(self) -> None:
        live, self._live = self._live, None
        for name, value in (live or {}).items():
            self._parameters[name].copy_(value)
