"""Signals, and the end of the job, end a run after its step; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from loopkit.distributed.launcher import ending_signals
from loopkit.fit.job_clock import JOB_END, JobClock
from loopkit.run import Interrupted, Run

PREEMPTED = 143
PREEMPTIONS = ("SIGTERM", "SIGHUP", JOB_END)
"""The reasons for which a process ends with that code. They outrank a Ctrl-C."""


def _heard(run: Run, number: int, reason: str) -> str:
    """Return a line that says what a signal starts."""
    name = "Ctrl-C" if number == signal.SIGINT else reason
    saves = "its state is saved then" if run.checkpointer is not None else "nothing is saved"
    again = ". Ctrl-C again leaves at once" if number == signal.SIGINT else ""
    return f"{name}: finishing step {run.progress.step + 1:,}, {saves}{again}"


@contextmanager
def signals(run: Run) -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP save and end the run after the current step.

    SIGUSR1 only saves. A SIGHUP that was ignored before, as under nohup, stays so. A handler only
    notes a request. Before the end of a SLURM job the run ends as by a SIGTERM (see JobClock).
    Outside of the main thread, where Python takes no handlers, signals have no effect.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        with JobClock(run, lambda: run.end("interrupted", JOB_END)):
            yield
        return
    seen: set[int] = set()
    # A signal also wakes a main thread that waits for data.
    clock = JobClock(run, lambda: signal.pthread_kill(main.ident or 0, signal.SIGTERM))

    def end(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in seen:
            raise KeyboardInterrupt
        seen.add(number)
        by_clock = clock.due and number == signal.SIGTERM
        reason = JOB_END if by_clock else signal.Signals(number).name
        run.end("interrupted", reason)
        run.screen.say(_heard(run, number, reason))
        if run.committed.waiting_for_data:  # no step is half done, and the data may never come
            raise Interrupted

    def save(number: int, frame: FrameType | None) -> None:
        run.coordinator.request(run, "save")

    before = {number: signal.signal(number, end) for number in ending_signals()}
    if hasattr(signal, "SIGUSR1"):
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, save)
    try:
        with clock:
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
