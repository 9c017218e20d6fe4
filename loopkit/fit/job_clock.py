"""JobClock: ends a run in time before SLURM ends its job."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable
from types import TracebackType

from loopkit.distributed.job_end import find_job_end
from loopkit.errors import LoopkitError, LoopkitWarning
from loopkit.run import Run

logger = logging.getLogger(__name__)

JOB_END = "the end of its SLURM job"
# Seconds for the last step and its save, and the part of a short job that they get at most.
_MARGIN, _PART = 120.0, 0.1
# Seconds by which two answers of SLURM may differ for the same end.
_INEXACT = 5.0


class JobClock:
    """Waits, in a thread of rank 0, until the job of a run is about to end.

    It says at the start when that is. Outside of a SLURM job with a time limit, and under
    ``job_margin=False``, it does nothing.

    Args:
        run: the run, whose option ``job_margin`` says how much time the end needs.
        end: called in the thread when that much time is left.

    Attributes:
        due: whether the job is about to end.
    """

    def __init__(self, run: Run, end: Callable[[], None]) -> None:
        self.due = False
        self._end = end
        self._margin = 0.0
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None  # starts when its signal is met
        if run.options.job_margin is False or run.strategy.rank != 0:
            return
        try:
            at = find_job_end()
        except LoopkitError as error:
            warnings.warn(
                f"{error}. The run cannot save by itself before that: have SLURM send a signal in "
                "time, with #SBATCH --signal=TERM@120, or pass job_margin=False",
                LoopkitWarning,
                stacklevel=2,
            )
            return
        if at is None:
            return
        left = max(0.0, at - time.time())
        given = run.options.job_margin_seconds()
        self._margin = min(_MARGIN, _PART * left) if given is None else given
        text = (
            f"SLURM ends this job at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}: the run "
            f"saves its state and ends {self._margin:.0f} s before (job_margin)"
        )
        logger.info(text)
        run.screen.say(text)
        self._thread = threading.Thread(
            target=self._wait, args=(at,), name="loopkit-job-clock", daemon=True
        )

    def __enter__(self) -> JobClock:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _wait(self, at: float) -> None:
        while not self._closed.wait(max(0.0, at - self._margin - time.time())):
            try:
                later = find_job_end(ask=True)
            except LoopkitError:
                later = at  # as it was known at the start
            if later is not None and later <= at + _INEXACT:
                self.due = True
                self._end()
                return
            if later is None:
                return
            at = later
