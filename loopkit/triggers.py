"""Triggers: everything that is not done at every step, folded into one number per step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from loopkit.durations import Cadence, RunLength

_NEVER = 1 << 62


@dataclass(slots=True)
class Due:
    """The actions between two steps. Every rank computes the same value.

    Attributes:
        log, eval, save: log the collected values, evaluate, save a checkpoint.
        end_epoch: close the epoch, because its data is used up or because somebody asked for it.
        stop: end the run, because somebody asked for it.
    """

    log: bool = False
    eval: bool = False
    save: bool = False
    end_epoch: bool = False
    stop: bool = False


class Triggers:
    """Decide which actions are due at which step.

    Most steps have no action: a step compares its number with ``next`` and continues.

    Attributes:
        next: the first step after which an action is due, as far as step numbers tell.
        next_deadline: seconds of training after which an action is due; infinite without a clock.
        cadences: the repeated actions, by name ("log", "eval", "save").

    Args:
        cadences: the repeated actions, by name.
        stop_step: the last step of the run; None where the number of steps is not known.
        stop_seconds: seconds of training after which the run ends; None without a time limit.
        first: the actions to do after the first step.
    """

    __slots__ = ("_requests", "_stop_seconds", "_stop_step", "cadences", "next", "next_deadline")

    def __init__(
        self,
        cadences: Mapping[str, Cadence],
        stop_step: int | None = None,
        *,
        stop_seconds: float | None = None,
        first: Iterable[str] = (),
    ) -> None:
        self.cadences = dict(cadences)
        self.next = 0
        self.next_deadline = math.inf
        self._stop_step = stop_step
        self._stop_seconds = stop_seconds
        self._requests: set[str] = set(first)

    def set_length(self, length: RunLength) -> None:
        """Follow a change of the length of the run."""
        self._stop_step = length.steps
        for cadence in self.cadences.values():
            cadence.set_length(length)

    def request(self, what: str) -> None:
        """Make ``what`` due at the end of the current step; between steps, of the next one."""
        self._requests.add(what)
        self.next = 0

    def is_requested(self, what: str) -> bool:
        """Return whether ``what`` was requested and is not done yet."""
        return what in self._requests

    def has_requests(self) -> bool:
        """Return whether any request is not done yet."""
        return bool(self._requests)

    def pop(self, what: str) -> bool:
        """Remove one request; return whether it was there."""
        requested = what in self._requests
        self._requests.discard(what)
        return requested

    def pop_due(
        self, step: int, seconds: float, epoch: int | None, *, counted: bool = False
    ) -> Due:
        """Return the actions that are due after ``step``, and remove all requests.

        Args:
            step: optimizer steps completed.
            seconds: seconds of training.
            epoch: the number of completed epochs if this step closes one; None otherwise.
            counted: True if the actions of this step were done already, and only then its data
                turned out to be the last of the epoch. Cadences in steps are not looked at again.
        """
        due = set(self._requests)
        self._requests = set()
        for name, cadence in self.cadences.items():
            if not (counted and cadence.counts_steps) and cadence.is_due(step, seconds, epoch):
                due.add(name)
        return Due(
            log="log" in due,
            eval="eval" in due,
            save="save" in due,
            end_epoch=epoch is not None or "end_epoch" in due,
            stop="stop" in due,
        )

    def update_next(self, step: int, at_latest: int | None = None) -> None:
        """Compute ``next``, which is ``at_latest`` or before, and ``next_deadline`` from ``step``."""
        cadences = self.cadences.values()
        steps = [cadence.next_step(step) for cadence in cadences if cadence.next_seconds is None]
        steps += [at_latest, self._stop_step, step + 1 if self._requests else None]
        self.next = min((at for at in steps if at is not None), default=_NEVER)
        deadlines = [*(cadence.next_seconds for cadence in cadences), self._stop_seconds]
        self.next_deadline = min((at for at in deadlines if at is not None), default=math.inf)

    def state_dict(self) -> dict[str, Any]:
        """Return the open requests and the clocks of cadences in seconds."""
        clocks = {name: cadence.last_seconds for name, cadence in self.cadences.items()}
        requests = sorted(self._requests - {"stop", "save", "clock"})
        return {"requests": requests, "clocks": clocks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""
        self._requests = set(state["requests"])
        for name, seconds in state["clocks"].items():
            if name in self.cadences:
                self.cadences[name].last_seconds = seconds
