"""What logged values decide: the best checkpoint, and schedules that watch a metric."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping

from loopkit.errors import LoopkitWarning, OptionError, nearest
from loopkit.monitor import Monitor, is_of_evaluation
from loopkit.optim.lr_schedulers import BoundSchedule
from loopkit.run import Run


def check_monitors(run: Run) -> None:
    """Refuse to wait for a metric of an evaluation in a run that never evaluates.

    Raises:
        OptionError: ``Checkpoint(best=)`` or a schedule names a metric, and nothing is evaluated.
    """
    if run.eval_data:
        return
    monitor = run.options.monitor()
    if monitor is not None and is_of_evaluation(monitor.name):
        raise OptionError(
            f"Checkpoint(best={str(monitor)!r}) waits for an evaluation, and this run has none: "
            "give the task an eval_data and an eval_step, and leave eval_every on; or name a value "
            "that training logs, as 'train/loss:min'"
        )
    for _, watched in _watching(run):
        if is_of_evaluation(watched):
            raise OptionError(
                f"a schedule watches {watched!r} and nothing is evaluated: define eval_data and "
                "eval_step, and give eval_every= a cadence; or let it watch a value that training "
                "logs"
            )


def read_evaluation(run: Run, metrics: Mapping[str, float]) -> None:
    """Let the metrics of an evaluation decide.

    Raises:
        MetricError: a metric of evaluations is asked for, and this one did not give it.
    """
    monitor = run.options.monitor()
    if monitor is not None and (is_of_evaluation(monitor.name) or monitor.name in metrics):
        record_best(run, monitor, monitor.value(metrics, "Checkpoint(best=)"))
    for schedule in run.schedules.values():
        watched = getattr(schedule, "metric", None)
        if watched is None or is_of_evaluation(watched) or watched in metrics:
            schedule.after_eval(metrics)


def read_logged(run: Run, values: Mapping[str, float]) -> None:
    """Let a row of values that training logged decide, about what no evaluation gives."""
    monitor = run.options.monitor()
    if monitor is not None and monitor.name in values and not is_of_evaluation(monitor.name):
        record_best(run, monitor, values[monitor.name])
    for schedule, watched in _watching(run):
        if watched in values and not is_of_evaluation(watched):
            schedule.after_eval(values)


def record_best(run: Run, monitor: Monitor, value: float) -> None:
    """Request a checkpoint if ``value`` is the best so far."""
    if monitor.is_better(value, run.record.best.get("value")):
        run.record.best = {
            "metric": monitor.name,
            "value": value,
            "step": run.progress.step,
            "epoch": run.progress.epoch,
        }
        run.coordinator.request(run, "save")
    elif math.isnan(value):
        warn_once(
            run,
            f"{monitor.name} is NaN at step {run.progress.step}: NaN is never the best, so no "
            "checkpoint is kept for it",
            about=f"nan {monitor.name}",
        )


def warn_of_unlogged(run: Run) -> None:
    """Warn of names that something waits for, and that nothing has logged so far."""
    for name, who in _watched(run):
        pending = run.accumulator.names()
        if is_of_evaluation(name) or name in run.metrics or name in pending:
            continue
        known = sorted({*run.metrics, *pending})
        warn_once(
            run,
            f"{who} waits for {name!r}, and nothing of that name was logged up to step "
            f"{run.progress.step}.{nearest(name, known)} Logged: {', '.join(known) or 'nothing'}",
            about=f"unlogged {name}",
        )


def warn_of_no_best(run: Run) -> None:
    """Warn where the best weights are to be loaded, and no value was ever the best."""
    saves, monitor = run.options.saves(), run.options.monitor()
    if saves is not None and saves.load_best and monitor is not None and not run.record.best:
        warn_once(
            run,
            f"load_best=True loads nothing: {monitor.name} was never a number, so there is no best "
            "checkpoint, and the task keeps its last weights",
            about="no best",
        )


def warn_once(run: Run, message: str, *, about: str) -> None:
    """Warn on rank 0, once in a run for each thing that a warning is about."""
    if about not in run.record.warned:
        run.record.warned.add(about)
        if run.strategy.rank == 0:
            warnings.warn(message, LoopkitWarning, stacklevel=3)


def _watching(run: Run) -> Iterator[tuple[BoundSchedule, str]]:
    """Yield the schedules that watch a metric, each with its name."""
    for schedule in run.schedules.values():
        watched = getattr(schedule, "metric", None)
        if watched:
            yield schedule, watched


def _watched(run: Run) -> Iterator[tuple[str, str]]:
    """Yield the names that something of this run waits for, each with its owner."""
    monitor = run.options.monitor()
    if monitor is not None:
        yield monitor.name, f"Checkpoint(best={str(monitor)!r})"
    for _, watched in _watching(run):
        yield watched, "a schedule"
    for hook in run.hooks:
        own = getattr(hook, "monitor", None)
        if isinstance(own, Monitor):
            yield own.name, type(hook).__name__
