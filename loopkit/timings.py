"""The seconds of a run: Stopwatch measures them, Timings adds up those of steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Stopwatch:
    """Measure the seconds of training; it stands still until ``start``."""

    read: Callable[[], float] = time.perf_counter
    _started: float | None = None

    def start(self) -> None:
        """Start measuring."""
        self._started = self.read()

    def elapsed(self) -> float:
        """Return the seconds since the last ``start`` or ``lap``; 0 before the first start."""
        return 0.0 if self._started is None else self.read() - self._started

    def lap(self) -> float:
        """Return the seconds since the last ``start`` or ``lap``, and start again."""
        now = self.read()
        elapsed = 0.0 if self._started is None else now - self._started
        self._started = now
        return elapsed


@dataclass(slots=True)
class Timings:
    """Host seconds of a run's steps, in total and by part.

    Attributes:
        data: seconds of waiting for batches.
        compute: seconds of the user's step and its backward pass.
        update: seconds of the optimizer step.
        total: seconds of whole steps.
        steps: the number of steps measured.
    """

    data: float = 0.0
    compute: float = 0.0
    update: float = 0.0
    total: float = 0.0
    steps: int = 0

    def per_step(self) -> dict[str, float]:
        """Return microseconds per step by part; "framework" is the rest of "step", the whole."""
        each = 1e6 / max(1, self.steps)
        parts = {"data": self.data, "compute": self.compute, "update": self.update}
        parts = {name: seconds * each for name, seconds in parts.items()}
        whole = self.total * each
        return parts | {"framework": whole - sum(parts.values()), "step": whole}
