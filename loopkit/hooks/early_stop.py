"""EarlyStop: end a run whose metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loopkit.checks import checked_int, checked_number
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.keywords import checks_keywords
from loopkit.monitor import Monitor

if TYPE_CHECKING:
    from loopkit.run import Run


@checks_keywords
class EarlyStop(Hook):
    """Stops the run after ``patience`` evaluations in a row without an improvement.

    A value that is not finite is no improvement. The counters are saved with the run: one that was
    stopped stays stopped when it is resumed, without another step, unless it is resumed with a
    larger patience.

    Args:
        metric: the metric's full name and its mode: "eval/loss:min" or "eval/accuracy:max".
        patience: evaluations without an improvement that end the run.
        min_delta: by how much a value must be better than the best before to count as an
            improvement.

    Attributes:
        best: the best value so far, None before the first evaluation.
        best_step: the step it was measured at.
        waited: evaluations since.

    Raises:
        OptionError: an argument that is not accepted.
    """

    def __init__(
        self, metric: str = "eval/loss:min", patience: int = 3, min_delta: float = 0.0
    ) -> None:
        self.monitor = Monitor.parse(metric, "EarlyStop()")
        self.patience = checked_int(patience, "EarlyStop(patience=)")
        self.min_delta = checked_number(min_delta, "EarlyStop(min_delta=)", at_least=0)
        self._loaded: Mapping[str, Any] | None = None
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def on_setup(self, run: Run) -> None:
        """Start counting, or go on counting after a resume.

        Raises:
            OptionError: the run never evaluates.
        """
        if run.loader is None:
            return  # nothing is trained
        if not run.eval_data:
            raise OptionError(
                f"EarlyStop waits for {self.monitor.name!r}, and this run never evaluates: give the task "
                f"an "
                "eval_data and an eval_step, and leave eval_every on"
            )
        self._take(self._loaded or {})
        self._loaded = None

    def on_fit_start(self, run: Run) -> None:
        """Keep a run that was stopped stopped."""
        if self.waited >= self.patience:
            reason = "it was stopped before: resume with a larger patience to continue"
            run.end("stopped", f"{self._why()}; {reason}", agreed=True)

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Compare with the best so far, and stop where it is time.

        Raises:
            MetricError: the evaluation gave no such metric.
        """
        if run.loader is None:
            return
        value = self.monitor.value(metrics, "EarlyStop()")
        if self.monitor.is_better(value, self.best, min_delta=self.min_delta):
            self.best, self.best_step, self.waited = value, run.progress.step, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop(self._why())

    def state_dict(self) -> dict[str, Any]:
        """The counters."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._loaded = state

    def _take(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.waited = (
            state.get("best"),
            state.get("best_step", 0),
            state.get("waited", 0),
        )

    def _why(self) -> str:
        count = f"{self.waited} evaluation{'s' * (self.waited != 1)}"
        if self.best is None:
            return f"EarlyStop: {self.monitor.name} was not a number in {count}"
        return (
            f"EarlyStop: {self.monitor.name} has not improved for {count}; its best is {self.best:.6g} "
            f"at step "
            f"{self.best_step}"
        )
