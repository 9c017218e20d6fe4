"""EMA: an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loopkit.checkpoint import check_state, load_snapshot, reading
from loopkit.checks import checked_number
from loopkit.durations import Duration
from loopkit.errors import CheckpointError
from loopkit.events import Hook
from loopkit.hooks.cadence import cadence_in_steps
from loopkit.hooks.state_keys import distinct_key, find_state
from loopkit.hooks.weight_averaging import AveragedParameters, trained_parameters
from loopkit.keywords import checks_keywords
from loopkit.storage import fetched

if TYPE_CHECKING:
    from loopkit.run import Run


@checks_keywords
class EMA(Hook):
    """Average the weights exponentially: ``average = decay * average + (1 - decay) * weights``.

    The average of all trained parameters often generalises better than the last weights.
    Evaluations of the run measure the averaged weights, and training continues with its own.
    Buffers such as BatchNorm's statistics are not averaged: the latest ones go with the averages.
    Checkpoints hold both sets of weights; :meth:`apply` takes the averages from one. Weights in
    float16 or bfloat16 are averaged in float32, where small updates are not rounded away.

    Examples:
        >>> ema = EMA(decay=0.999)
        >>> Fit(epochs=10, hooks=[ema]).run(task)
        >>> ema.apply(task)

    Args:
        decay: the part of the average that stays at each update, between 0 and 1.
        every: steps between updates; also "1 epoch" or "1%" if the data has a length.
        warmup: use ``min(decay, (1 + n) / (10 + n))`` at update n, so that the average forgets the
            first weights soon. The formula is that of TensorFlow's ExponentialMovingAverage with
            ``num_updates``.
        evaluate: evaluate with the averaged weights.
        apply_at_end: leave the averaged weights in the task when the run ends, unless a signal
            interrupted it. Under ``Checkpoint(load_best=True)`` they are those of the best
            checkpoint.

    Attributes:
        updates: how often the averages were updated.

    Raises:
        OptionError: an argument is not accepted.
    """

    may_request = False

    def __init__(
        self,
        decay: float = 0.999,
        every: str | int = 1,
        warmup: bool = False,
        evaluate: bool = True,
        apply_at_end: bool = False,
    ) -> None:
        self._every = Duration.parse(every, "EMA(every=)", by_clock=False)
        self.decay = checked_number(decay, "EMA(decay=)", above=0, below=1)
        self.warmup = warmup
        self.evaluate = evaluate
        self.apply_at_end = apply_at_end
        self.updates = 0
        self._averages: AveragedParameters | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._live: dict[str, Tensor] | None = None
        self._loaded: Mapping[str, Any] = {}
        self._key: str | None = None

    def on_setup(self, run: Run) -> None:
        """Start from the present weights, or from the averages of the checkpoint.

        Raises:
            CheckpointError: the checkpoint's averages are of other parameters.
            OptionError: ``every`` needs data with a length.
        """
        self._parameters = {}
        if run.loader is None:
            return  # nothing is trained, so earlier averages stay
        self._cadence = cadence_in_steps(self._every, run.length, "EMA(every=)")
        self._due = self._cadence.next_step(run.progress.step)
        self._key = distinct_key(self, run.hooks)
        self._live = None
        self._parameters = trained_parameters(run)
        saved, self._loaded = self._loaded, {}
        with reading(run.record.resumed_from or "", "hooks.EMA"):
            self._averages = AveragedParameters(self._parameters, saved.get("averages"), "EMA")
        self.updates = saved.get("updates", 0)

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Move the averages towards the weights."""
        if self._averages is None or run.progress.step != self._due:
            return
        self._due = self._cadence.next_step(run.progress.step)
        decay = self.decay
        if self.warmup:
            decay = min(decay, (1 + self.updates) / (10 + self.updates))
        self._averages.move(self._parameters, 1 - decay)
        self.updates += 1

    def on_eval_start(self, run: Run) -> None:
        """Replace the weights by the averages for the evaluation."""
        if self.evaluate and self._parameters and self._averages is not None:
            self._live = {name: p.detach().clone() for name, p in self._parameters.items()}
            self._averages.copy_to(self._parameters)

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Restore the weights, bit for bit."""
        self._restore()

    def on_eval_interrupted(self, run: Run) -> None:
        """Restore the weights if a signal cut an evaluation short."""
        self._restore()

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Restore the weights if an evaluation raised."""
        self._restore()

    def on_fit_end(self, run: Run) -> None:
        """Leave the averages in the task, if ``apply_at_end``."""
        if not self.apply_at_end or run.outcome.status == "interrupted":
            return
        saves = run.options.saves()
        best = run.record.best.get("checkpoint") if saves is not None and saves.load_best else None
        self.apply(run.task, best)

    def apply(
        self, task: nn.Module, checkpoint: str | Path | None = None, name: str | None = None
    ) -> None:
        """Copy the averages into the parameters of ``task``.

        Args:
            task: a task with the same parameters.
            checkpoint: take the averages that this checkpoint holds for this hook, instead of the
                present ones. Also a run directory, for its newest checkpoint.
            name: the name of the hook in the checkpoint, such as "EMA-2" for the second EMA of
                its run. Needed if the checkpoint holds several and this hook was not one of them.

        Raises:
            CheckpointError: there are no averages, they are of other parameters, or the checkpoint
                holds those of several hooks and ``name`` does not say which to take.
        """
        parameters = dict(task.named_parameters())
        averages = self._averages
        if checkpoint is not None:
            with fetched(checkpoint) as path:
                state = load_snapshot(path).state
            check_state(state, checkpoint, only=("hooks",))
            own = find_state(state.get("hooks", {}), self, name or self._key, checkpoint)
            with reading(checkpoint, "hooks"):
                saved = own.get("averages")
            if saved is None:
                raise CheckpointError(f"{checkpoint} holds no averages of a hook {name}")
            with reading(checkpoint, "hooks"):
                averages = AveragedParameters(
                    {n: p for n, p in parameters.items() if n in saved}, saved, "EMA"
                )
        if averages is None:
            raise CheckpointError(
                "this EMA has averaged nothing yet: run a task with it, or name a checkpoint"
            )
        averages.copy_to(parameters)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and how often they were updated."""
        averages = {} if self._averages is None else self._averages.tensors
        return {"updates": self.updates, "averages": dict(averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep a state for ``on_setup``, which moves it to the device."""
        self._loaded = state

    @torch.no_grad()
    def _restore(self) -> None:
        live, self._live = self._live, None
        for name, value in (live or {}).items():
            self._parameters[name].copy_(value)
