"""check_resume: a run that stops at any step and resumes is the run that never stopped."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopkit.events import Hook
from loopkit.fit.fit import Fit
from loopkit.options import Checkpoint
from loopkit.run import Run
from loopkit.task import Task
from loopkit.testing.trace import train


@dataclass(frozen=True)
class ResumeReport:
    """What was checked.

    Attributes:
        steps: the steps of the run.
        resumes: how many runs were stopped and resumed.
        values: how many tensors and values of the final state were compared, in each.
    """

    steps: int
    resumes: int
    values: int


class _StopsAt(Hook):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, run: Run, out: Any) -> None:
        if run.progress.step == self.step:
            run.stop("to be resumed")


def check_resume(task: Task, fit: Fit, *, steps: int = 8, ignore: str = "") -> ResumeReport:
    """Check that a resume from every step is exact, bit by bit.

    Copies of the task are trained in this process, in temporary directories. Compared are the
    weights, everything else that a checkpoint holds, the loss of each step and the rows of the log.

    Args:
        task: the task.
        fit: the options of a short run. Its ``eval_every`` and ``log_every`` decide what is
            compared; ``run_dir``, ``loggers``, ``checkpoint`` and ``resume`` are replaced.
        steps: the steps to train, fewer if the options end the run before.
        ignore: a regular expression of names of values that may differ, such as times.

    Raises:
        AssertionError: naming the step, and what differs.
    """
    changes = {"steps": steps, "checkpoint": Checkpoint(every="never", background=False)}
    with tempfile.TemporaryDirectory(prefix="loopkit-check-") as name:
        place = Path(name)
        whole = train(task, fit, place / "whole", _StopsAt(None), ignore=ignore, **changes)
        for step in range(1, whole.step):
            run_dir = place / str(step)
            first = train(task, fit, run_dir, _StopsAt(step), ignore=ignore, **changes)
            second = train(task, fit, run_dir, _StopsAt(None), ignore=ignore, **changes)
            second.losses = first.losses | second.losses
            different = whole.differences(second)
            if different:
                raise AssertionError(
                    f"a run that is stopped at step {step} and resumed is another run: "
                    f"{'; '.join(different[:8])}"
                    f"{f'; and {len(different) - 8} more' if len(different) > 8 else ''}. "
                    "What the task keeps from step to step belongs into a buffer, get_extra_state, "
                    "or the state_dict of a hook"
                )
    return ResumeReport(whole.step, max(0, whole.step - 1), len(whole.state))
