"""Search: the trials of a sweep whose values Optuna chooses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from loopkit.cli.sweep.space import Space
from loopkit.cli.sweep.trials import Sweep, Trial
from loopkit.hooks.optuna_prune import STUDY, journal


class Search:
    """Ask Optuna for one trial after another, and tell it how each ended.

    The study is in a file of the sweep's directory, from which an interrupted sweep continues.

    Args:
        sweep: where the trials are kept.
        space: the values to choose from.
        seed: of Optuna's sampler.

    Raises:
        MissingExtraError: Optuna is not installed.
    """

    JOURNAL = "optuna.log"

    def __init__(self, sweep: Sweep, space: Space, seed: int) -> None:
        storage = journal(sweep.directory / self.JOURNAL)
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._sweep, self._space = sweep, space
        self._study: Any = optuna.create_study(
            study_name=STUDY,
            storage=storage,
            load_if_exists=True,
            direction="minimize" if sweep.monitor.mode == "min" else "maximize",
            # A new process would draw the same numbers again.
            sampler=optuna.samplers.TPESampler(seed=seed + len(sweep.trials)),
        )

    def trials(self, count: int) -> Iterator[Trial]:
        """Yield trials until there are ``count``; each is run before the next is asked for."""
        for trial in [each for each in self._sweep.trials if not each.over]:
            yield trial
            self._tell(trial)
        while len(self._sweep.trials) < count:
            asked = self._study.ask()
            values = {name: each.suggest(name, asked) for name, each in self._space.items()}
            trial = Trial(len(self._sweep.trials) + 1, values, optuna=asked.number)
            self._sweep.trials.append(trial)
            self._sweep.save()
            yield trial
            self._tell(trial)

    def _tell(self, trial: Trial) -> None:
        """Tell Optuna the best value of a trial, or that it was pruned or failed."""
        from optuna.trial import TrialState

        if not trial.over:
            return
        frozen = self._study.trials[trial.optuna]
        if frozen.user_attrs.get("pruned"):
            trial.status = "pruned"
            self._sweep.save()
            self._study.tell(trial.optuna, state=TrialState.PRUNED)
        elif trial.status == "failed" or trial.best is None:
            self._study.tell(trial.optuna, state=TrialState.FAIL)
        else:
            self._study.tell(trial.optuna, trial.best)
