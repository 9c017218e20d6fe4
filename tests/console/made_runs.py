"""Runs made by hand, and a clock to go with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from loopkit.durations import RunLength
from loopkit.events import Events, Hook
from loopkit.loops.coordination import Coordinator
from loopkit.options import Options
from loopkit.run import Loops, Record, Run
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.single import SingleDevice
from loopkit.task import Task
from loopkit.triggers import Triggers


class Digits(Task):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


class Clock:
    """Seconds that pass when told to, and how often they were asked for."""

    def __init__(self) -> None:
        self.now, self.reads = 1000.0, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.now


def made_run(*hooks: Hook, length: RunLength | None = None, rank: int = 0, **fields: Any) -> Run:
    """A run of ``Digits`` on the CPU that nothing drives: 4 epochs of 100 steps."""
    strategy = SingleDevice("cpu")
    strategy.setup_environment(ComputeSettings())
    strategy.rank = rank
    fields.setdefault("run_dir", Path("runs/digits/3"))
    kept = {name: fields.pop(name) for name in list(fields) if name in vars(Record())}
    return Run(
        task=Digits(),
        strategy=strategy,
        options=Options(),
        length=length or RunLength(100, 400, 4),
        triggers=Triggers({}),
        events=Events(hooks),
        loops=Loops(None, None, None, None),
        coordinator=Coordinator(),
        eval_data={"": SimpleNamespace(batches_per_epoch=lambda: 8)},
        record=Record(**kept),
        **fields,
    )


def take_step(run: Run, clock: Clock, seconds: float = 0.0) -> None:
    """One step is complete after ``seconds``."""
    clock.now += seconds
    run.progress.step += 1
    run.progress.step_in_epoch += 1
    run.progress.seconds += seconds
    if run.progress.step_in_epoch == 100:
        run.progress.close_epoch()
    assert run.events.step_end is not None
    run.events.step_end(run, {"loss": None})


def evaluate(run: Run, clock: Clock, **metrics: float) -> None:
    """One evaluation of eight batches in 0.4 seconds."""
    run.events.eval_start(run)
    for _ in range(8):
        clock.now += 0.05
        run.events.eval_step_end(run, {})
    found = {f"eval/{name}": value for name, value in metrics.items()}
    found |= {"eval/runtime": 0.4, "eval/samples_per_second": 2500.0}
    run.metrics.update(found)
    run.events.eval_end(run, found)
