"""Signals during a run: ask for an orderly end at the next step, and let a second Ctrl-C through at
once.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from loopkit.run import Interrupted, Run

PREEMPTED = 143


@contextmanager
def signals(run: Run) -> Iterator[None]:
    """Inside: SIGINT and SIGTERM end the run after the step under way, its state saved; SIGUSR1
    saves and goes on.

    A handler only notes the request. Without effect outside the main thread, where Python takes no
    handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        if (
            number == signal.SIGINT
            and run.requested_end is not None
            and run.requested_end[0] == "interrupted"
        ):
            raise KeyboardInterrupt
        run.end("interrupted", signal.Signals(number).name)
        if run.waiting_for_data:  # nothing is half done, and the data may never come
            raise Interrupted

    def save(number: int, frame: FrameType | None) -> None:
        run.triggers.request("save")

    wanted: dict[int, Any] = {signal.SIGINT: end, signal.SIGTERM: end}
    if hasattr(signal, "SIGUSR1"):
        wanted[signal.SIGUSR1] = save
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
