"""Signals during a run request its end after the current step; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from loopkit.distributed.launcher import ending_signals
from loopkit.run import Interrupted, Run

PREEMPTED = 143
PREEMPTIONS = ("SIGTERM", "SIGHUP")
"""The signals after which a process ends with that code. They outrank a Ctrl-C."""


def _heard(run: Run, number: int) -> str:
    """Return a line that says what a signal starts."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    saves = "its state is saved then" if run.checkpointer is not None else "nothing is saved"
    again = ". Ctrl-C again leaves at once" if number == signal.SIGINT else ""
    return f"{name}: finishing step {run.progress.step + 1:,}, {saves}{again}"


@contextmanager
def signals(run: Run) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP save and end the run after the current step.

    SIGUSR1 only saves. A SIGHUP that was ignored before, as under nohup, stays so. A handler only
    notes a request. Outside of the main thread, where Python takes no handlers, this has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen: set[int] = set()

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.add(number)
        run.end("interrupted", signal.Signals(number).name)
        run.screen.say(_heard(run, number))
        if run.committed.waiting_for_data:  # no step is half done, and the data may never come
            raise Interrupted

    def save(number: int, frame: FrameType | None) -> None:
        run.coordinator.request(run, "save")

    before = {number: signal.signal(number, end) for number in ending_signals()}
    if hasattr(signal, "SIGUSR1"):
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, save)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
