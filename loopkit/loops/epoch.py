"""EpochLoop: one pass over the training data, step by step, with what is due in between.

for each group of micro-batches:
    on_step_start; one step; count it; on_step_end
    where something is due: log, close the epoch, evaluate
    on_commit: all state agrees; where due, save
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import inf
from time import perf_counter

from loopkit import rng
from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import DataError
from loopkit.loops.coordination import agree, join, spaced
from loopkit.loops.nonfinite import check_finite
from loopkit.run import Interrupted, Run
from loopkit.task import name_of


class EpochLoop:
    """One pass over the data, from wherever the progress stands."""

    def run(self, run: Run) -> None:
        """Go through the rest of the epoch; returns early when the run is to stop.

        Raises:
            NotFiniteError: under ``on_nan="raise"``, naming the step and its samples.
            DataError: the data gave no batch.
        """
        progress, events, agenda, strategy, timings = (
            run.progress,
            run.events,
            run.triggers,
            run.strategy,
            run.timings,
        )
        assert run.train_loader is not None
        step, joint, batches = run.loops.step, strategy.world_size > 1, None
        if events.epoch_start is not None:
            events.epoch_start(run)
        agenda.update_next(progress.step)
        run.sync_schedule.spaced = joint and spaced(run)
        timed = (
            not joint and agenda.next_deadline < inf
        )  # among ranks the first one's clock is met between two steps
        groups = iter(run.train_loader.open(progress.epoch, progress.position))
        while True:
            began = perf_counter()
            held, batches = batches, fetch(run, groups)
            if joint:
                batches = join(run, batches, held)
            if (joint or batches is None) and self.between(run, stepped=held is not None):
                return
            timings.data += perf_counter() - began
            if batches is None:
                break
            if events.step_start is not None:
                events.step_start(run, batches)
            out = step.run(run, batches)
            bad = strategy.finish_step()
            progress.count(batches)
            if bad:
                check_finite(run)
            run.data_position = batches.state
            if events.step_end is not None:
                events.step_end(run, out)
            timings.steps += 1
            if (
                progress.step < agenda.next
                and not batches.last
                and not (timed and run.seconds() >= agenda.next_deadline)
            ):
                if events.commit is not None:
                    events.commit(run)
                timings.total += perf_counter() - began
                continue
            timings.total += perf_counter() - began
            if self.boundary(run, epoch_is_over=batches.last):
                return
        if progress.step_in_epoch == 0:
            raise DataError(
                f"{name_of(run.task)}.train_data() gave no batch in epoch {progress.epoch}: "
                "there is nothing to train on"
            )
        self.boundary(run, epoch_is_over=True, between_steps=True)

    def between(self, run: Run, *, stepped: bool) -> bool:
        """Meet what was asked for since the last step, by a signal or by other ranks; whether to
        leave this pass.
        """
        joint = run.strategy.world_size > 1
        left = False
        if run.triggers.is_requested("stop") and not (stepped and joint):
            self.leave(run)
            left = True
        elif stepped and joint and run.triggers.has_requests():
            left = self.boundary(run, epoch_is_over=False, between_steps=True)
        elif joint and run.triggers.has_requests():
            run.triggers.update_next(
                run.progress.step
            )  # asked for before the first step: met at its end
        run.rng_state_at_commit = None
        return left

    def leave(self, run: Run) -> None:
        """A signal broke off the wait for data: save the state of the last commit."""
        run.stopping = True
        run.tick()
        if run.checkpointer is not None:
            check_finite(run)
            run.checkpointer.save(run)

    def boundary(self, run: Run, *, epoch_is_over: bool, between_steps: bool = False) -> bool:
        """Do what is due after the step just counted; returns whether this pass is to be left.

        ``between_steps`` says that the step was dealt with before, and only then its pass turned
        out to be over.
        """
        progress, events, agenda = run.progress, run.events, run.triggers
        run.tick()
        collected = agree(run)
        ended = progress.epoch + 1 if epoch_is_over else None
        due = agenda.pop_due(progress.step, progress.seconds, ended, again=between_steps)
        epoch_is_over = epoch_is_over or "end_epoch" in due
        check_finite(run)
        run.accumulator.compact()
        if epoch_is_over:
            progress.close_epoch()
            run.data_position = None
        run.stopping = run.stopping or "stop" in due
        closing = (
            run.finished() and run.status == "finished"
        )  # a run cut short logs nothing it would not have logged
        if "log" in due or (closing and collected):
            run.log_now()
        if epoch_is_over and events.epoch_end is not None:
            events.epoch_end(run)
        if run.evaluation and ("eval" in due or (closing and run.options.eval_every != "never")):
            evaluate(run)
        if events.commit is not None and not between_steps:
            events.commit(run)
        agree(run)
        if run.checkpointer is not None:
            asked = agenda.pop(
                "save"
            )  # by the evaluation just done; what is saved now is that, due or not
            if asked or "save" in due or run.finished() or agenda.is_requested("stop"):
                run.checkpointer.save(run)
            run.checkpointer.poll(run)
        run.stopping = run.stopping or agenda.is_requested("stop")
        agenda.update_next(progress.step)
        return epoch_is_over or run.finished()


def fetch(run: Run, groups: Iterator[MicroBatches]) -> MicroBatches | None:
    """The next group; None when there is none, or a signal broke off the wait for it, where that
    can be told.
    """
    heard = (
        run.progress.step >= run.sync_schedule.next
    )  # else the others would go on without this rank
    if heard and run.seed is None and run.strategy.world_size > 1:
        # What is asked for by others is met after this, and saved as if nothing had been drawn for
        # it.
        run.rng_state_at_commit = rng.get_state(run.strategy.device)
    run.waiting_for_data = heard
    try:
        return next(groups, None)
    except Interrupted:
        return None
    finally:
        run.waiting_for_data = False


def evaluate(run: Run) -> None:
    """Evaluate in the midst of training, leaving no trace in it, publish the metrics and note the
    best.

    Raises:
        MetricError: ``Checkpoint(best=)`` names a metric that the evaluation did not give.
    """
    metrics = run.loops.eval.run(run, run.evaluation)
    run.last_eval_step = run.progress.step
    record_best(run, metrics)
    for schedule in run.schedules.values():
        schedule.after_eval(metrics)
    run.publish(metrics)
    if run.events.eval_end is not None:
        run.events.eval_end(run, metrics)


def record_best(run: Run, metrics: Mapping[str, float]) -> None:
    """Ask for a checkpoint where the metric that decides is better than ever before."""
    saves = run.options.saves()
    monitor = saves.monitor() if saves is not None else None
    if monitor is None:
        return
    value = monitor.value(metrics, "Checkpoint(best=)")
    if monitor.is_better(value, run.best.get("value")):
        run.best = {
            "metric": monitor.name,
            "value": value,
            "step": run.progress.step,
            "epoch": run.progress.epoch,
        }
        run.triggers.request("save")
