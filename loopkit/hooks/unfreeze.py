"""Unfreeze: parts of a model that start frozen and are trained from a given point of the run on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from loopkit.durations import Duration
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.hooks.weight_averaging import trained_parameters
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run

_SHOWN = 8


@checks_keywords
class Unfreeze(Hook):
    """Freezes what its patterns name when the run starts, and unfreezes each at its time.

    ``Unfreeze({"1 epoch": r"encoder\\.layer\\.(10|11)", "50%": "encoder"})`` trains the rest for an
    epoch, then the two last layers too, then everything. What several patterns name is unfrozen by
    the first of them in time. The optimizer holds all of it from the start; what is frozen has no
    gradient, and neither moves nor decays. BatchNorm layers that are frozen keep their statistics.
    What is frozen follows from the step alone, so a resumed run goes on as it would have.

    Args:
        stages: what to unfreeze, by when: a duration from the start of the run ("2 epochs", "25%",
            1000) to a regular expression for the full name of modules or parameters, or several of
            them.

    Raises:
        OptionError: there are no stages, or one is not accepted.
    """

    may_request = False

    def __init__(self, stages: Mapping[str | int, str | Sequence[str]]) -> None:
        if not isinstance(stages, Mapping) or not stages:
            raise OptionError(
                f"Unfreeze({stages!r}): give when and what, as Unfreeze({{'2 epochs': 'encoder'}})"
            )
        self._stages: list[tuple[Duration, list[str]]] = []
        for when, what in stages.items():
            duration = Duration.parse(when, "Unfreeze()", by_clock=False)
            patterns = [what] if isinstance(what, str) else list(what)
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise OptionError(
                        f"Unfreeze: {pattern!r} is not a regular expression: {error}"
                    ) from error
            self._stages.append((duration, patterns))
        self._waiting: dict[str, int] = {}

    def on_setup(self, run: Run) -> None:
        """Freeze what is still to be unfrozen.

        Raises:
            OptionError: a pattern names nothing that is trained, everything is frozen, or a time
                cannot be told.
        """
        self._waiting, self._next = {}, -1
        if run.loader is None:
            return
        trained = trained_parameters(run)
        for duration, patterns in self._stages:
            steps = duration.in_steps(run.length, "Unfreeze")
            if steps is None:
                raise OptionError(
                    f"Unfreeze({{'{duration}': …}}) needs data with a length: give it in steps"
                )
            for pattern in patterns:
                for name in _named(pattern, trained, run.task):
                    self._waiting[name] = min(ceil(steps), self._waiting.get(name, ceil(steps)))
        if run.progress.step == 0 and self._waiting.keys() >= trained.keys():
            raise OptionError(
                "Unfreeze freezes every parameter that is trained: leave something to start with"
            )
        for name in self._waiting:
            trained[name].requires_grad_(False)
        self._thaw(run)

    def on_epoch_start(self, run: Run) -> None:
        """Keep the statistics of what is frozen, whatever set the modules to training in between."""
        self._hold_statistics(run)

    def on_step_start(self, run: Run, batches: Sequence[Any]) -> None:
        """Unfreeze what is due."""
        if self._waiting and run.progress.step >= self._next:
            self._thaw(run)

    def on_fit_end(self, run: Run) -> None:
        """Leave nothing frozen behind."""
        self._release(run)

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Leave nothing frozen behind."""
        self._release(run)

    def _thaw(self, run: Run) -> None:
        due = [name for name, step in self._waiting.items() if step <= run.progress.step]
        self._free(run, due)
        self._next = min(self._waiting.values(), default=-1)
        self._hold_statistics(run)

    def _release(self, run: Run) -> None:
        self._free(run, list(self._waiting))

    def _free(self, run: Run, names: Sequence[str]) -> None:
        parameters = dict(run.task.named_parameters())
        for name in names:
            del self._waiting[name]
            parameters[name].requires_grad_(True)
        for name, module in run.task.named_modules():
            if isinstance(module, _BatchNorm) and any(n.rpartition(".")[0] == name for n in names):
                module.train()

    def _hold_statistics(self, run: Run) -> None:
        for name, module in run.task.named_modules():
            if isinstance(module, _BatchNorm) and any(
                n.rpartition(".")[0] == name for n in self._waiting
            ):
                module.eval()


def _named(pattern: str, trained: Mapping[str, nn.Parameter], task: nn.Module) -> list[str]:
    whole = re.compile(rf"(?:{pattern})(\..*)?")
    found = [name for name in trained if whole.fullmatch(name)]
    if found:
        return found
    there = [name for name, _ in task.named_parameters() if whole.fullmatch(name)]
    if there:
        raise OptionError(
            f"Unfreeze: {pattern!r} names {there[0]}, which no optimizer holds: leave "
            f"requires_grad on "
            "and give it to an optimizer; Unfreeze freezes it itself"
        )
    shown = list(trained)
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    raise OptionError(
        f"Unfreeze: {pattern!r} names no module and no parameter. There are "
        f"{', '.join(shown[:_SHOWN])}{more}"
    )
