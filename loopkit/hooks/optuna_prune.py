"""OptunaPrune: report evaluations to a trial of Optuna, and stop the run if Optuna gives it up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loopkit.errors import OptionError, missing_extra
from loopkit.events import Hook
from loopkit.keywords import checks_keywords
from loopkit.monitor import Monitor

if TYPE_CHECKING:
    from loopkit.run import Run

STUDY = "sweep"


@checks_keywords
class OptunaPrune(Hook):
    """Report a metric to a trial of Optuna at each evaluation, and stop the run if it is hopeless.

    Example::

        def objective(trial):
            task = Net(lr=trial.suggest_float("lr", 1e-5, 1e-1, log=True))
            pruning = OptunaPrune(trial, "eval/loss:min")
            result = Fit(epochs=10, hooks=[pruning]).run(task)
            if pruning.pruned:
                raise optuna.TrialPruned
            return result.metrics["eval/loss"]

    ``loopkit sweep --optuna`` uses this hook too, with a study that is in a file.

    Args:
        trial: the trial; or the path of a journal file that holds a study called "sweep".
        monitor: the metric to report, such as "eval/loss:min". Its mode must be the study's
            direction.
        number: the number of the trial, if ``trial`` is a path.

    Attributes:
        pruned: whether the run was stopped.

    Raises:
        MissingExtraError: Optuna is not installed.
        OptionError: an argument is not accepted.
    """

    def __init__(
        self, trial: Any, monitor: str = "eval/loss:min", number: int | None = None
    ) -> None:
        self._monitor = Monitor.parse(monitor, "OptunaPrune(monitor=)")
        if isinstance(trial, (str, Path)):
            if number is None:
                raise OptionError(f"OptunaPrune({str(trial)!r}): give the number of the trial too")
            trial = _trial_in(Path(trial), number)
        self._trial = trial
        self.pruned = False

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Report the metric, and stop the run if Optuna says so."""
        if run.strategy.rank != 0:
            return
        value = self._monitor.value(metrics, "OptunaPrune(monitor=)")
        if math.isfinite(value):
            self._trial.report(value, run.progress.step)
        if not math.isfinite(value) or self._trial.should_prune():
            self.pruned = True
            self._trial.set_user_attr("pruned", True)
            run.stop(f"pruned by Optuna, with {self._monitor.name} {value:.4g}")


def journal(path: Path) -> Any:
    """Return the storage of Optuna in a file.

    Raises:
        MissingExtraError: Optuna is not installed.
    """
    try:
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise missing_extra("optuna", "optuna", "OptunaPrune and loopkit sweep --optuna") from None
    return JournalStorage(JournalFileBackend(str(path)))


def _trial_in(path: Path, number: int) -> Any:
    storage = journal(path)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.load_study(study_name=STUDY, storage=storage)
    found = [each for each in study.trials if each.number == number]
    if not found:
        raise OptionError(f"{path} has no trial {number}")
    return optuna.trial.Trial(study, found[0]._trial_id)
