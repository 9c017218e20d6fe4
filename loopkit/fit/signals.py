"""Signals during a run request its end after the current step; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loopkit.run import Interrupted, Run

PREEMPTED = 143


def _heard(run: Run, number: int) -> str:
    """Return a line that says what a signal starts."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    saves = "its state is saved then" if run.checkpointer is not None else "nothing is saved"
    again = ". Ctrl-C again leaves at once" if number == signal.SIGINT else ""
    return f"{name}: finishing step {run.progress.step + 1:,}, {saves}{again}"


@contextmanager
def signals(run: Run) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM save and end the run after the current step; SIGUSR1 only saves.

    A handler only notes a request. Outside of the main thread, where Python takes no handlers, this
    has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        requested = run.coordinator.requested_end
        if number == signal.SIGINT and requested is not None and requested[0] == "interrupted":
            raise KeyboardInterrupt
        run.end("interrupted", signal.Signals(number).name)
        run.screen.say(_heard(run, number))
        if run.committed.waiting_for_data:  # no step is half done, and the data may never come
            raise Interrupted

    def save(number: int, frame: FrameType | None) -> None:
        run.coordinator.request(run, "save")

    handlers: dict[int, Any] = {signal.SIGINT: end, signal.SIGTERM: end}
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = save
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
