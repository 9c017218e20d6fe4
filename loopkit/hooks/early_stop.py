"""EarlyStop: end a run whose metric no longer improves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loopkit.checks import checked_int, checked_number
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.keywords import checks_keywords
from loopkit.monitor import Monitor, is_of_evaluation

if TYPE_CHECKING:
    from loopkit.run import Run


@checks_keywords
class EarlyStop(Hook):
    """Stop the run after ``patience`` evaluations in a row without an improvement.

    A metric of another name than ``eval/…`` is read whenever it is logged, and ``patience`` counts
    its logs. NaN is no improvement. The counters are saved with the run. A run that was stopped stays
    stopped if it is resumed, without another step, unless it is resumed with a larger patience.

    Examples:
        >>> Fit(epochs=50, hooks=[EarlyStop("eval/accuracy:max", patience=5)]).run(task)

    Args:
        metric: the metric's full name and its mode: "eval/loss:min", "eval/accuracy:max", or of a
            value that training logs, "train/loss:min".
        patience: the number of values without an improvement that ends the run.
        min_delta: the least difference from the best value that counts as an improvement.

    Attributes:
        best: the best value so far; None before the first.
        best_step: the step of the best value.
        waited: the number of values since.

    Raises:
        OptionError: an argument is not accepted.
    """

    def __init__(
        self, metric: str = "eval/loss:min", patience: int = 3, min_delta: float = 0.0
    ) -> None:
        self.monitor = Monitor.parse(metric, "EarlyStop()")
        self.patience = checked_int(patience, "EarlyStop(patience=)")
        self.min_delta = checked_number(min_delta, "EarlyStop(min_delta=)", at_least=0)
        self._loaded: Mapping[str, Any] = {}
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    def on_setup(self, run: Run) -> None:
        """Start to count, or continue with the counters of the checkpoint.

        Raises:
            OptionError: the metric is one of evaluations, and the run never evaluates.
        """
        if run.loader is None:
            return  # nothing is trained
        if not run.eval_data and is_of_evaluation(self.monitor.name):
            raise OptionError(
                f"EarlyStop waits for {self.monitor.name!r}, and this run never evaluates: give "
                "the task an eval_data and an eval_step, and leave eval_every on; or name a value "
                "that training logs, as 'train/loss:min'"
            )
        saved, self._loaded = self._loaded, {}
        self.best = saved.get("best")
        self.best_step = saved.get("best_step", 0)
        self.waited = saved.get("waited", 0)

    def on_fit_start(self, run: Run) -> None:
        """End a run that was stopped before it was resumed."""
        if self.waited >= self.patience:
            hint = "it was stopped before: resume with a larger patience to continue"
            run.end("stopped", f"{self._reason()}; {hint}", agreed=True)

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Compare the metric with the best so far, and stop the run if it is time.

        Raises:
            MetricError: the evaluation gave no such metric.
        """
        if run.loader is not None and is_of_evaluation(self.monitor.name):
            self._compare(run, self.monitor.value(metrics, "EarlyStop()"))

    def on_log(self, run: Run, values: Mapping[str, float]) -> None:
        """Compare a metric that is none of evaluations, in a row that has it."""
        name = self.monitor.name
        if run.loader is not None and name in values and not is_of_evaluation(name):
            self._compare(run, values[name])

    def _compare(self, run: Run, value: float) -> None:
        if self.monitor.is_better(value, self.best, min_delta=self.min_delta):
            self.best = value
            self.best_step = run.progress.step
            self.waited = 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop(self._reason())

    def state_dict(self) -> dict[str, Any]:
        """Return the counters."""
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the counters for ``on_setup``."""
        best = state.get("best")
        self._loaded = {**state, "best": None if best is None else float(best)}

    def _reason(self) -> str:
        name = self.monitor.name
        what = "evaluation" if is_of_evaluation(name) else "log"
        count = f"{self.waited} {what}{'s' * (self.waited != 1)}"
        if self.best is None:
            return f"EarlyStop: {name} was not a number in {count}"
        return (
            f"EarlyStop: {name} has not improved for {count}; its best is {self.best:.6g} "
            f"at step {self.best_step}"
        )
