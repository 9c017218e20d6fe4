"""How fast a run goes and when it will be over."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopkit.durations import RunLength
    from loopkit.run import Run

_MEMORY = 15.0


class SpeedEstimate:
    """Steps per second, smoothed exponentially over the last fifteen seconds or so."""

    def __init__(self) -> None:
        self._step = 0
        self._at: float | None = None
        self._weighted = 0.0
        self._weight = 0.0

    def restart(self, step: int, now: float) -> None:
        """Go on from ``step`` at ``now``: what lies before was no training, and does not count."""
        self._step, self._at = step, now

    def tick(self, step: int, now: float) -> None:
        """``step`` steps are complete at ``now``."""
        if self._at is None or step < self._step:
            self.restart(step, now)
            return
        taken = now - self._at
        if step == self._step or taken <= 0:
            return
        keep = math.exp(-taken / _MEMORY)
        self._weighted = keep * self._weighted + (1 - keep) * (step - self._step) / taken
        self._weight = keep * self._weight + (1 - keep)
        self._step, self._at = step, now

    @property
    def rate(self) -> float | None:
        """Steps per second; None before the second tick."""
        return self._weighted / self._weight if self._weight else None


@dataclass(frozen=True)
class Eta:
    """Where a run stands: steps in all, share done and seconds left, each None where nothing tells."""

    total: int | None
    done: float | None
    left: float | None


def total_steps(length: RunLength) -> int | None:
    """The number of optimizer steps of a run, where it is known."""
    if length.steps is not None:
        return length.steps
    if length.epochs is not None and length.steps_per_epoch is not None:
        return math.ceil(length.epochs * length.steps_per_epoch)
    return None


def outlook(run: Run, steps_per_second: float | None) -> Eta:
    """What is to come, by the limit that will be reached first."""
    total, shares, left = total_steps(run.length), [], []
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
    """The epoch as a number: 1.5 is in the middle of the second."""
    per_epoch = run.length.steps_per_epoch
    return run.progress.epoch + (run.progress.step_in_epoch / per_epoch if per_epoch else 0.0)


def epoch_text(run: Run) -> str:
    """``2/5``: the epoch under way, counted from 1, of how many; ``2`` where their number is not
    known.
    """
    length, epoch = run.length, run.progress.epoch
    epochs = length.epochs
    if length.steps is not None and length.steps_per_epoch:
        epochs = length.steps / length.steps_per_epoch
    if epochs is None:
        return str(epoch + 1)
    return f"{min(epoch + 1, max(1, math.ceil(epochs)))}/{math.ceil(epochs)}"
