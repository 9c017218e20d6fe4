"""TorchSchedule: a scheduler object of torch, stepped after steps, after epochs or by a metric."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from loopkit.checks import checked_choice, checked_int
from loopkit.durations import RunLength
from loopkit.errors import LoopkitWarning, OptionError, nearest
from loopkit.monitor import metric_value

# Schedulers whose settings torch's own examples give in epochs. Given alone, they are stepped after
# each optimizer step, which is reported.
_OFTEN_BY_EPOCH = (
    "StepLR", "MultiStepLR", "ExponentialLR", "MultiplicativeLR", "ConstantLR", "LinearLR",
    "PolynomialLR", "CosineAnnealingLR", "CosineAnnealingWarmRestarts",
)  # fmt: skip
_KEYS = ("scheduler", "interval", "frequency", "monitor", "strict", "reduce_on_plateau")


class TorchSchedule:
    """A scheduler object of torch, stepped after each optimizer step or after each epoch.

    A ``ReduceLROnPlateau`` is stepped after each evaluation, with its metric.

    Args:
        scheduler: the scheduler.
        interval: "step" or "epoch".
        frequency: after how many steps, epochs or evaluations it is stepped once.
        monitor: the full name of the metric of a ``ReduceLROnPlateau``.

    Attributes:
        metric: the name of the metric that it needs; None without one.
        count: the steps, epochs or evaluations since the start.

    Raises:
        OptionError: an argument that is not accepted.
    """

    def __init__(
        self,
        scheduler: Any,
        interval: str = "step",
        frequency: int = 1,
        monitor: str | None = None,
    ) -> None:
        name = type(scheduler).__name__
        if not callable(getattr(scheduler, "step", None)):
            raise OptionError(
                f"{name} is no scheduler of torch: give an optimizer with one, as (optimizer, "
                "scheduler), or with loopkit.optim's, as (optimizer, cosine())"
            )
        watches = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        if monitor is not None and not watches:
            raise OptionError(
                f"{name} watches no metric: leave monitor={monitor!r} out, or take "
                "ReduceLROnPlateau"
            )
        self.scheduler = scheduler
        self.interval = checked_choice(interval, f"{name}(interval=)", ("step", "epoch"))
        self.frequency = checked_int(frequency, f"{name}(frequency=)", at_least=1)
        self.metric = (monitor or "eval/loss") if watches else None
        self.count = 0

    def set_length(self, length: RunLength) -> None:
        """Do nothing: torch's schedulers know no length of the run."""

    def before_update(self, step: int) -> None:
        """Do nothing: torch's schedulers set the rate after a step."""

    def after_update(self) -> None:
        """Step the scheduler, if it counts steps."""
        if self.metric is None and self.interval == "step" and self._is_due():
            self.scheduler.step()

    def after_epoch(self) -> None:
        """Step the scheduler, if it counts epochs."""
        if self.metric is None and self.interval == "epoch" and self._is_due():
            self.scheduler.step()

    def after_eval(self, metrics: Mapping[str, float]) -> None:
        """Step the scheduler with its metric, if it needs one.

        Raises:
            MetricError: the evaluation gave no such metric.
        """
        if self.metric is not None and self._is_due():
            self.scheduler.step(metric_value(metrics, self.metric, type(self.scheduler).__name__))

    def _is_due(self) -> bool:
        self.count += 1
        return self.count % self.frequency == 0

    def state_dict(self) -> dict[str, Any]:
        """Return the scheduler's own state, and the count."""
        return {"scheduler": dict(self.scheduler.state_dict()), "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the state; warn where another kind of schedule was saved."""
        if "scheduler" not in state:
            warnings.warn(
                f"the schedule was {state.get('name')!r} when this checkpoint was saved and is now "
                f"{type(self.scheduler).__name__}, which begins at its start",
                LoopkitWarning,
                stacklevel=2,
            )
            return
        self.scheduler.load_state_dict(dict(state["scheduler"]))
        self.count = state["count"]


def torch_schedule(given: Any, optimizer: Optimizer) -> TorchSchedule:
    """Return the schedule of a scheduler object, or of Lightning's dict around one.

    Args:
        given: the scheduler, or ``{"scheduler": …, "interval": "epoch", "frequency": 1,
            "monitor": "eval/loss"}``. As in Lightning, the interval of a dict is "epoch" unless it
            says "step".
        optimizer: the optimizer that it belongs to.

    Raises:
        OptionError: a key or a value that is not accepted, or a scheduler of another optimizer.
    """
    if isinstance(given, Mapping):
        made = TorchSchedule(**_settings(given))
    else:
        made = TorchSchedule(given)
        name = type(given).__name__
        if name in _OFTEN_BY_EPOCH:
            warnings.warn(
                f"{name} is stepped after each optimizer step. Give (optimizer, {{'scheduler': "
                "scheduler, 'interval': 'epoch'}) to step it after each epoch, or 'step' if steps "
                "are meant",
                LoopkitWarning,
                stacklevel=2,
            )
    if getattr(made.scheduler, "optimizer", optimizer) is not optimizer:
        raise OptionError(
            f"{type(made.scheduler).__name__} was made for another optimizer than the one it is "
            "returned with, which it would never change"
        )
    return made


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``TorchSchedule`` in Lightning's dict."""
    for key in given:
        if key == "name":
            raise OptionError(
                "a scheduler has no 'name' here: its learning rate is logged as lr, or as "
                "lr/<optimizer> where there are several. Leave the name out"
            )
        if key not in _KEYS:
            raise OptionError(
                f"a scheduler has no setting {key!r}.{nearest(str(key), _KEYS)} It has "
                f"{', '.join(_KEYS)}"
            )
    if "scheduler" not in given:
        raise OptionError(f"a dict with {', '.join(given)} names no 'scheduler'")
    if not given.get("strict", True):
        raise OptionError(
            "strict=False would train on without the metric that the scheduler waits for: leave it "
            "out, and give monitor= a metric that every evaluation has"
        )
    kept = ("scheduler", "frequency", "monitor")
    settings = {key: given[key] for key in kept if given.get(key) is not None}
    return {"interval": given.get("interval", "epoch"), **settings}
