"""Agenda: everything that happens now and then, folded into one number that a plain step compares
itself with.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from loopkit.durations import Cadence

_NEVER = 1 << 62
SYNC_INTERVAL = 1.0


@dataclass(slots=True)
class SyncSchedule:
    """When the ranks next tell each other what is asked for: before every step, or about once a
    second.

    Attributes:
        spaced: whether once a second will do, since nothing but a signal can ask for anything
            within a step.
        next: the first step before which they do.
        tokens: those of this rank's batches that the others have not heard of.
    """

    spaced: bool = False
    next: int = 0
    tokens: int = 0
    _step: int = 0
    _time: float | None = None

    def take_tokens(self) -> int:
        """The tokens to tell of now."""
        tokens, self.tokens = self.tokens, 0
        return tokens

    def space(self, step: int, most: float) -> int:
        """How many steps from ``step`` on take about a second, or ``most`` of them; by those since
        last asked.
        """
        now, began, steps = perf_counter(), self._time, step - self._step
        self._step, self._time = step, now
        if began is None or steps < 1:
            return 1
        return max(1, int(min(SYNC_INTERVAL, most) * steps / max(now - began, 1e-9)))


class Triggers:
    """What is due at which step.

    Attributes:
        next: the first step at whose end anything is due; a step below it has nothing to do, but
            for the clock.
        alarm: after how many seconds of training anything is due; infinite where nothing goes by a
            clock.
        cadences: what repeats, by name ("log", "eval", "save").

    Args:
        stop_step: the last step.
        stop_seconds: after how many seconds of training it ends.
        joint: whether other ranks must hear of a request before it is met. Until then it is wished
            for, which changes nothing: a signal may come at any moment, and what it asks for must
            not show on one rank alone.
        first: what is due at the end of the first step.
    """

    __slots__ = (
        "_distributed",
        "_local_requests",
        "_requests",
        "_stop_seconds",
        "_stop_step",
        "cadences",
        "next",
        "next_deadline",
    )

    def __init__(
        self,
        cadences: Mapping[str, Cadence],
        stop_step: int | None = None,
        *,
        stop_seconds: float | None = None,
        joint: bool = False,
        first: Iterable[str] = (),
    ) -> None:
        self.cadences = dict(cadences)
        self.next, self.next_deadline = 0, math.inf
        self._distributed = joint
        self._stop_step = stop_step
        self._stop_seconds = stop_seconds
        self._requests: set[str] = set(first)
        self._local_requests: set[str] = set()

    def request(self, what: str) -> None:
        """Have ``what`` done at the end of the step under way (of the next one, between steps)."""
        if self._distributed:
            self._local_requests.add(what)
            return
        self._requests.add(what)
        self.next = 0

    def pop_local_requests(self) -> set[str]:
        """What this rank wishes for and the others have not heard of; it is theirs to hear now, and
        forgotten.
        """
        wished = set(self._local_requests)
        self._local_requests -= wished
        return wished

    def confirm(self, what: str) -> None:
        """All ranks know that ``what`` is asked for."""
        self._requests.add(what)

    def is_requested(self, what: str) -> bool:
        """Whether ``what`` is asked for and not yet done."""
        return what in self._requests

    def has_requests(self) -> bool:
        """Whether anything is asked for and not yet done."""
        return bool(self._requests)

    def pop(self, what: str) -> bool:
        """Whether ``what`` was asked for; it is no longer."""
        asked = what in self._requests
        self._requests.discard(what)
        return asked

    def pop_due(
        self, step: int, seconds: float, epoch_ended: int | None, *, again: bool = False
    ) -> set[str]:
        """What is due now that ``step`` is complete, requests included; they are forgotten.

        ``again`` is for an epoch whose end shows only after its last step was dealt with: what is
        due by the count of steps was done then.
        """
        cadences = {n: c for n, c in self.cadences.items() if not (again and c.counts_steps)}
        due = {
            name for name, cadence in cadences.items() if cadence.is_due(step, seconds, epoch_ended)
        }
        due |= self._requests
        self._requests = set()
        return due

    def state_dict(self) -> dict[str, Any]:
        """What is asked for and not done, and the clocks of cadences in time."""
        clocks = {name: cadence.last_seconds for name, cadence in self.cadences.items()}
        return {
            "is_requested": sorted(self._requests - {"stop", "save", "clock"}),
            "clocks": clocks,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._requests = set(state["is_requested"])
        for name, seconds in state["clocks"].items():
            if name in self.cadences:
                self.cadences[name].last_seconds = seconds

    def update_next(self, step: int) -> None:
        """Work out ``next`` and ``alarm`` as seen from ``step``."""
        cadences = self.cadences.values()
        ahead = [cadence.next_step(step) for cadence in cadences if cadence.next_seconds is None]
        ahead += [self._stop_step, step + 1 if self._requests else None]
        self.next = min((at for at in ahead if at is not None), default=_NEVER)
        clocks = [cadence.next_seconds for cadence in cadences]
        self.next_deadline = min(
            (at for at in (*clocks, self._stop_seconds) if at is not None), default=math.inf
        )
