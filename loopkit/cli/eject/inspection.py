"""What a run is made of: its data, optimizer and schedule, and what a training step returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from loopkit import rng
from loopkit.cli.eject.loop import check_loop, needs_loop, try_step
from loopkit.cli.eject.refusals import check_options, check_run, uses_ddp
from loopkit.fit.setup import new_run, prepare_training
from loopkit.fit.strategy_setup import processes_wanted
from loopkit.loops.step import read_step
from loopkit.options import Options
from loopkit.run import Run
from loopkit.task import Task


@dataclass(frozen=True)
class Inspected:
    """A run that is prepared for training, and what its task returned.

    Attributes:
        run: the run.
        data: what ``train_data`` returned.
        optimizers: what ``optimizers`` returned.
        batch: the first micro-batch.
        methods: the methods of the task that a step of the user's own calls.
        mapping: whether ``train_step`` returns a mapping, and not the loss alone.
        weight: the weight of the first micro-batch; None without one.
    """

    run: Run
    data: Any
    optimizers: Any
    batch: Any
    methods: Sequence[str] = ("train_step",)
    mapping: bool = False
    weight: Any = None


@contextmanager
def inspected(task: Task, options: Options) -> Iterator[Inspected]:
    """Prepare the run as Fit does, and take its first step, or call ``train_step`` once.

    Raises:
        OptionError: the run has what the script cannot hold.
        LoopkitError: the run cannot be prepared, as in ``loopkit fit``.
    """
    check_options(options, task)
    seen: dict[str, Any] = {}
    for name in ("train_data", "optimizers"):
        setattr(task, name, _recording(seen, name, getattr(task, name)))
    run = new_run(task, options)
    try:
        prepare_training(run)
        check_run(run, seen["optimizers"])
        batches = next(iter(run.train_loader.open(0, 0)))
        found = Inspected(run, seen["train_data"], seen["optimizers"], batches[0])
        if needs_loop(run):
            ddp = uses_ddp(options.strategy, processes_wanted(options))
            check_loop(run, options, ddp=ddp)
            yield replace(found, methods=try_step(run, batches))
        else:
            returned = _first_step(run, found.batch)
            _, weight, _ = read_step(returned, task, "train_step")
            yield replace(found, mapping=isinstance(returned, Mapping), weight=weight)
    finally:
        if run.loader is not None:
            run.loader.source.close()
        run.strategy.teardown()


def _recording(seen: dict[str, Any], name: str, method: Any) -> Any:
    def call() -> Any:
        seen[name] = method()
        return seen[name]

    return call


def _first_step(run: Run, batch: Any) -> Any:
    strategy = run.strategy
    strategy.set_seed(rng.at_step(run.options.seed, 0, 0))
    with strategy.forward_context or nullcontext():
        returned: Any = strategy.step_fn("train_step")(batch)
    return returned
