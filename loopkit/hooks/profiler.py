"""Profiler: a trace of a few steps, and the history of allocations if a GPU runs out of memory."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from loopkit.checks import checked_int
from loopkit.errors import LoopkitWarning
from loopkit.events import Hook
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run

_ALLOCATIONS = 100_000


@checks_keywords
class Profiler(Hook):
    """Profile a few steps with ``torch.profiler``, and write a trace for Perfetto.

    Open the trace at ui.perfetto.dev or chrome://tracing. Ranks after rank 0 write
    ``trace-<rank>.json``. On a CUDA device the history of allocations is recorded too. If the run
    runs out of memory, the hook writes it to ``memory.pickle``, for pytorch.org/memory_viz.

    Examples:
        >>> Fit(steps=20, hooks=[Profiler(wait=10, active=5)]).run(task)

    Args:
        wait: steps before the profiler starts.
        warmup: steps that it runs without recording.
        active: steps that it records.
        path: of the trace, absolute or within the run directory.
        memory: record the allocations of each operator too.
        stacks: record Python's call stacks too, which makes the steps slower.

    Attributes:
        trace: the path of the trace; None before it is written.

    Raises:
        OptionError: an argument is not accepted.
    """

    may_request = False

    def __init__(
        self,
        wait: int = 1,
        warmup: int = 1,
        active: int = 3,
        path: str | Path = "trace.json",
        memory: bool = False,
        stacks: bool = False,
    ) -> None:
        self._spans = {
            "wait": checked_int(wait, "Profiler(wait=)", at_least=0),
            "warmup": checked_int(warmup, "Profiler(warmup=)", at_least=0),
            "active": checked_int(active, "Profiler(active=)"),
        }
        self._path = Path(path)
        self._memory = memory
        self._stacks = stacks
        self._profile: profile | None = None
        self._recording = False
        self.trace: Path | None = None

    def on_fit_start(self, run: Run) -> None:
        """Start the profiler."""
        activities, cuda = [ProfilerActivity.CPU], run.strategy.device.type == "cuda"
        if cuda:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        target = _path_of_rank(self._path, run.run_dir, run.strategy.rank)
        self._steps = 0
        self.trace = None
        self._recording = cuda

        def write(finished: profile) -> None:
            target.parent.mkdir(parents=True, exist_ok=True)
            finished.export_chrome_trace(str(target))
            self.trace = target

        self._profile = profile(
            activities=activities,
            schedule=schedule(**self._spans, repeat=1),
            on_trace_ready=write,
            record_shapes=True,
            profile_memory=self._memory,
            with_stack=self._stacks,
        )
        with warnings.catch_warnings():
            # The user asked for warmup=0.
            warnings.filterwarnings("ignore", "Profiler won't be using warmup", UserWarning)
            self._profile.start()

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Count the step, and stop the profiler after the last one that it records."""
        if self._profile is None:
            return
        self._profile.step()
        self._steps += 1
        if self._steps >= sum(self._spans.values()):
            self._stop()

    def on_fit_end(self, run: Run) -> None:
        """Stop the profiler, and warn if the run was too short for it."""
        self._stop()
        if self.trace is None:
            spans = ", ".join(f"{name}={count}" for name, count in self._spans.items())
            warnings.warn(
                f"Profiler({spans}) wrote no trace: the run took {self._steps} steps",
                LoopkitWarning,
                stacklevel=2,
            )
        self._stop_recording()

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Stop the profiler, and write the history of allocations if the GPU ran out of memory."""
        if self._recording and isinstance(exception, torch.OutOfMemoryError):
            target = _path_of_rank(Path("memory.pickle"), run.run_dir, run.strategy.rank)
            torch.cuda.memory._dump_snapshot(str(target))  # type: ignore[no-untyped-call]
            print(
                f"loopkit: the history of allocations is in {target}: see pytorch.org/memory_viz",
                file=sys.stderr,
            )
        self._stop()
        self._stop_recording()

    def _stop(self) -> None:
        profiler, self._profile = self._profile, None
        if profiler is not None:
            profiler.stop()

    def _stop_recording(self) -> None:
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
        self._recording = False


def _path_of_rank(path: Path, run_dir: Path | None, rank: int) -> Path:
    named = path.with_name(f"{path.stem}-{rank}{path.suffix}") if rank else path
    return (run_dir or Path()) / named
