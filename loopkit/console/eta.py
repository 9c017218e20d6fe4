"""The speed of a run, and the time until it ends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopkit.durations import RunLength
    from loopkit.run import Run

_TIME_CONSTANT = 15.0


class SpeedEstimate:
    """Steps per second, averaged exponentially with a time constant of 15 seconds."""

    def __init__(self) -> None:
        self._step = 0
        self._at: float | None = None
        self._weighted = 0.0
        self._weight = 0.0

    def restart(self, step: int, now: float) -> None:
        """Continue from ``step`` at ``now``: the time since the last tick was no training."""
        self._step, self._at = step, now

    def tick(self, step: int, now: float) -> None:
        """Note that ``step`` steps are complete at ``now``."""
        if self._at is None or step < self._step:
            self.restart(step, now)
            return
        taken = now - self._at
        if step == self._step or taken <= 0:
            return
        keep = math.exp(-taken / _TIME_CONSTANT)
        self._weighted = keep * self._weighted + (1 - keep) * (step - self._step) / taken
        self._weight = keep * self._weight + (1 - keep)
        self._step, self._at = step, now

    @property
    def rate(self) -> float | None:
        """Steps per second; None before the second tick."""
        return self._weighted / self._weight if self._weight else None


@dataclass(frozen=True)
class Eta:
    """The progress of a run towards its end.

    Attributes:
        total: its steps; None if their number is not known.
        done: the part that is complete, from 0 to 1; None if no limit is known.
        left: the seconds that remain; None if they cannot be estimated.
    """

    total: int | None
    done: float | None
    left: float | None


def total_steps(length: RunLength) -> int | None:
    """Return the number of optimizer steps of a run; None if it is not known."""
    if length.steps is not None:
        return length.steps
    if length.epochs is not None and length.steps_per_epoch is not None:
        return math.ceil(length.epochs * length.steps_per_epoch)
    return None


def estimate(run: Run, steps_per_second: float | None) -> Eta:
    """Estimate how far a run is, by the limit that it reaches first."""
    total = total_steps(run.length)
    shares, left = [], []
    if total:
        shares.append(run.progress.step / total)
        if steps_per_second:
            left.append((total - run.progress.step) / steps_per_second)
    if run.length.seconds:
        seconds = run.seconds()
        shares.append(seconds / run.length.seconds)
        left.append(run.length.seconds - seconds)
    done = min(1.0, max(shares)) if shares else None
    return Eta(total, done, max(0.0, min(left)) if left else None)


def epoch_now(run: Run) -> float:
    """Return the epoch as a number: 1.5 is in the middle of the second epoch."""
    per_epoch = run.length.steps_per_epoch
    return run.progress.epoch + (run.progress.step_in_epoch / per_epoch if per_epoch else 0.0)


def epoch_text(run: Run) -> str:
    """Return ``2/5`` in the second of five epochs, or ``2`` if their number is not known."""
    length, epoch = run.length, run.progress.epoch
    epochs = length.epochs
    if length.steps is not None and length.steps_per_epoch:
        epochs = length.steps / length.steps_per_epoch
    if epochs is None:
        return str(epoch + 1)
    return f"{min(epoch + 1, max(1, math.ceil(epochs)))}/{math.ceil(epochs)}"
