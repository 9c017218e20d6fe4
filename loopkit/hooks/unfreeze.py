"""Unfreeze: parts of a model start frozen, and are trained from a given point of the run."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from loopkit.durations import Duration
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.hooks.weight_averaging import held_parameters
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run

_MOST_LISTED = 8


@checks_keywords
class Unfreeze(Hook):
    """Freeze parts of a model when the run starts, and unfreeze each of them later.

    Use it for gradual unfreezing of a pretrained model. A parameter that several patterns name is
    unfrozen at the first of their times. The optimizer holds all parameters from the start. A
    frozen parameter has no gradient, so it neither moves nor decays, and a frozen BatchNorm layer
    keeps its statistics. The step alone decides what is frozen, so a resumed run continues exactly.

    Examples:
        Train the rest for one epoch, then the last two layers too, and everything from half of
        the run:

        >>> Unfreeze({"1 epoch": r"encoder\\.layer\\.(10|11)", "50%": "encoder"})

    Args:
        stages: from a duration since the start of the run ("2 epochs", "25%", 1000) to the parts to
            unfreeze then: one or several regular expressions for the full names of modules or
            parameters.

    Raises:
        OptionError: there are no stages, or one is not accepted.
    """

    may_request = False

    @property
    def frozen(self) -> list[str]:
        """The names of the parameters that are frozen now."""
        return list(self._frozen)

    def __init__(self, stages: Mapping[str | int, str | Sequence[str]]) -> None:
        if not isinstance(stages, Mapping) or not stages:
            raise OptionError(
                f"Unfreeze({stages!r}): give when and what, as Unfreeze({{'2 epochs': 'encoder'}})"
            )
        self._stages: list[tuple[Duration, list[str]]] = []
        for when, parts in stages.items():
            patterns = [parts] if isinstance(parts, str) else list(parts)
            for pattern in patterns:
                _check_pattern(pattern)
            self._stages.append((Duration.parse(when, "Unfreeze()", by_clock=False), patterns))
        self._frozen: dict[str, int] = {}

    def on_setup(self, run: Run) -> None:
        """Freeze the parameters whose time has not come.

        Raises:
            OptionError: a pattern names nothing that is trained, everything would be frozen, or a
                duration needs data with a length.
        """
        self._frozen = {}
        self._next = -1
        if run.loader is None:
            return
        trained = held_parameters(run)
        for duration, patterns in self._stages:
            steps = duration.in_steps(run.length, "Unfreeze()")
            if steps is None:
                raise OptionError(
                    f"Unfreeze({{'{duration}': …}}) needs data with a length: give it in steps"
                )
            for pattern in patterns:
                for name in _matching(pattern, trained, run.task):
                    self._frozen[name] = min(ceil(steps), self._frozen.get(name, ceil(steps)))
        if run.progress.step == 0 and self._frozen.keys() >= trained.keys():
            raise OptionError(
                "Unfreeze freezes every parameter that is trained: leave something to start with"
            )
        for name in self._frozen:
            trained[name].requires_grad_(False)
        self._unfreeze_due(run)

    def on_epoch_start(self, run: Run) -> None:
        """Keep frozen BatchNorm layers in eval mode: something may have called ``task.train()``."""
        self._hold_statistics(run)

    def on_step_start(self, run: Run, batches: Sequence[Any]) -> None:
        """Unfreeze the parameters whose time has come."""
        if self._frozen and run.progress.step >= self._next:
            self._unfreeze_due(run)

    def on_fit_end(self, run: Run) -> None:
        """Unfreeze everything."""
        self._unfreeze(run, list(self._frozen))

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Unfreeze everything."""
        self._unfreeze(run, list(self._frozen))

    def _unfreeze_due(self, run: Run) -> None:
        due = [name for name, step in self._frozen.items() if step <= run.progress.step]
        self._unfreeze(run, due)
        self._next = min(self._frozen.values(), default=-1)
        self._hold_statistics(run)

    def _unfreeze(self, run: Run, names: Collection[str]) -> None:
        parameters = dict(run.task.named_parameters())
        for name in names:
            del self._frozen[name]
            parameters[name].requires_grad_(True)
        for layer in _batch_norms(run.task, names):
            layer.train()

    def _hold_statistics(self, run: Run) -> None:
        for layer in _batch_norms(run.task, self._frozen):
            layer.eval()


def _batch_norms(task: nn.Module, names: Collection[str]) -> list[_BatchNorm]:
    """Return the BatchNorm layers that hold one of the named parameters."""
    owners = {name.rpartition(".")[0] for name in names}
    return [
        module
        for name, module in task.named_modules()
        if isinstance(module, _BatchNorm) and name in owners
    ]


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise OptionError(f"Unfreeze: {pattern!r} is not a regular expression: {error}") from error


def _matching(pattern: str, trained: Mapping[str, nn.Parameter], task: nn.Module) -> list[str]:
    """Return the names of trained parameters that a pattern names, or whose module it names.

    Raises:
        OptionError: there are none.
    """
    whole = re.compile(rf"(?:{pattern})(\..*)?")
    found = [name for name in trained if whole.fullmatch(name)]
    if found:
        return found
    untrained = [name for name, _ in task.named_parameters() if whole.fullmatch(name)]
    if untrained:
        raise OptionError(
            f"Unfreeze: {pattern!r} names {untrained[0]}, which no optimizer holds: leave "
            "requires_grad on and give it to an optimizer; Unfreeze freezes it itself"
        )
    listed = ", ".join(list(trained)[:_MOST_LISTED])
    more = f" and {len(trained) - _MOST_LISTED} more" if len(trained) > _MOST_LISTED else ""
    raise OptionError(
        f"Unfreeze: {pattern!r} names no module and no parameter. There are {listed}{more}"
    )
