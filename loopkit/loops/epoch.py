"""EpochLoop: one pass over the training data, and what is done between two steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from time import perf_counter

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import DataError
from loopkit.fit.length import update_length
from loopkit.loops.check_finite import check_finite
from loopkit.loops.monitors import read_evaluation, read_logged, warn_of_unlogged
from loopkit.metrics.accumulator import MetricAccumulator
from loopkit.metrics.kept import metrics_snapshot
from loopkit.preserve import preserved_modes
from loopkit.run import Interrupted, Run
from loopkit.task import measured_set, name_of


class EpochLoop:
    """One pass over the data, from the position at which the progress stands."""

    def run(self, run: Run) -> None:
        """Train on the rest of the epoch; return early when the run is to stop.

        In short::

            on_epoch_start
            for batches in train_loader.open(epoch, position):   # one optimizer step each
                on_step_start
                loops.step.run(run, batches)                      # forward, backward, update
                progress.count(batches)
                on_step_end
                if nothing is due:                                # most steps
                    on_commit
                else:
                    self.between_steps(run)                       # log, evaluate, commit, save

        On several ranks, a control message before a step brings the requests of the others
        (``loops.coordination``).

        Raises:
            NotFiniteError: under ``on_nan="raise"``, naming the step and its samples.
            DataError: the data has no batch.
        """
        progress, triggers, strategy = run.progress, run.triggers, run.strategy
        events, coordinator, step_loop = run.events, run.coordinator, run.loops.step
        distributed = coordinator.distributed
        timings, stopwatch = run.record.timings, run.stopwatch
        groups = self.start(run)
        # Among ranks, rank 0's clock is looked at where control messages are exchanged.
        timed = not distributed and triggers.next_deadline < inf
        batches: MicroBatches | None = None
        while True:
            began = perf_counter()
            last = batches
            batches = fetch(run, groups)
            if distributed:
                batches = coordinator.before_step(run, batches, last)
            may_end = distributed or batches is None
            if may_end and self.meet_requests(run, stepped=last is not None):
                return
            timings.data += perf_counter() - began
            if batches is None:
                break
            if events.step_start is not None:
                events.step_start(run, batches)
            out = step_loop.run(run, batches)
            nonfinite = strategy.finish_step()
            progress.count(batches)
            if nonfinite:
                check_finite(run)
            run.committed.data = batches.state
            if events.step_end is not None:
                events.step_end(run, out)
            timings.steps += 1
            timings.total += perf_counter() - began
            late = timed and progress.seconds + stopwatch.elapsed() >= triggers.next_deadline
            if progress.step < triggers.next and not batches.last and not late:
                if events.commit is not None:
                    events.commit(run)
            elif self.between_steps(run, epoch_over=batches.last):
                return
        if progress.step_in_epoch == 0:
            raise DataError(
                f"{name_of(run.task)}.train_data() gave no batch in epoch {progress.epoch}: "
                "there is nothing to train on"
            )
        self.between_steps(run, epoch_over=True, counted=True)

    def start(self, run: Run) -> Iterator[MicroBatches]:
        """Start the epoch, or what is left of it; return its micro-batches, step by step."""
        progress, events = run.progress, run.events
        if progress.epoch:
            warn_of_unlogged(run)
        if events.epoch_start is not None:
            events.epoch_start(run)
        groups = iter(run.train_loader.open(progress.epoch, progress.position))
        update_length(run)  # the data may have another length in this epoch
        run.triggers.update_next(progress.step)
        run.coordinator.start_epoch(run)
        return groups

    def between_steps(self, run: Run, *, epoch_over: bool, counted: bool = False) -> bool:
        """Do what is due after the last step: log, close the epoch, evaluate, commit, save.

        Args:
            run: the run.
            epoch_over: whether that step used the last data of this pass.
            counted: True if this was called for that step before. Only a request, or the end of
                the data, is due then.

        Returns:
            Whether this pass ends here.
        """
        progress, events, triggers = run.progress, run.events, run.triggers
        progress.seconds += run.stopwatch.lap()
        collected = run.coordinator.sync(run)
        epoch = progress.epoch + 1 if epoch_over else None
        due = triggers.pop_due(progress.step, progress.seconds, epoch, counted=counted)
        check_finite(run)
        run.accumulator.compact()
        if due.end_epoch:
            progress.close_epoch()
            run.committed.data = run.train_loader.end_state()
            update_length(run)
        run.outcome.ending |= due.stop
        if run.finished() and run.outcome.status == "finished":
            # The last step also logs and evaluates. A run cut short does not: resumed, it must log
            # the same rows as a run that never stopped.
            due.log |= collected
            due.eval |= run.options.eval_every != "never"
        if due.log:
            read_logged(run, run.log_now())
        if due.end_epoch:
            with row_of_its_own(run):
                if events.epoch_end is not None:
                    events.epoch_end(run)
        interrupted = bool(due.eval and run.eval_data) and evaluate(run) is None
        if due.end_epoch and not interrupted:
            self.after_epoch(run)
        elif due.end_epoch:
            triggers.request("after_epoch")
        if events.commit is not None and not counted:
            events.commit(run)
        run.coordinator.sync(run)
        # The evaluation may have requested a save, and a hook the end of the run.
        due.save |= triggers.pop("save")
        run.outcome.ending |= triggers.is_requested("stop")
        at_latest = None
        if run.checkpointer is not None:
            if due.save or run.finished():
                run.checkpointer.save(run)
            run.checkpointer.poll(run)
            at_latest = run.checkpointer.next_poll(progress.step)
        triggers.update_next(progress.step, at_latest)
        return due.end_epoch or run.finished()

    def after_epoch(self, run: Run) -> None:
        """Step the schedules that count epochs: the epoch is closed, and its evaluation is done."""
        for schedule in run.schedules.values():
            schedule.after_epoch()

    def meet_requests(self, run: Run, *, stepped: bool) -> bool:
        """Do what was requested since the last step, by a signal or by other ranks.

        Args:
            run: the run.
            stepped: whether this call of ``run`` has taken a step.

        Returns:
            Whether this pass ends here.
        """
        distributed, leaves = run.coordinator.distributed, False
        if run.triggers.is_requested("stop") and not (stepped and distributed):
            self.stop_before_step(run)
            leaves = True
        elif distributed and run.triggers.has_requests():
            if stepped:
                leaves = self.between_steps(run, epoch_over=False, counted=True)
            else:
                run.triggers.update_next(run.progress.step)  # met after the first step
        run.committed.rng_state = None
        return leaves

    def stop_before_step(self, run: Run) -> None:
        """End the run where it waits for data, and save the state of the last commit."""
        run.outcome.ending = True
        run.progress.seconds += run.stopwatch.lap()
        if run.checkpointer is not None:
            check_finite(run)
            run.checkpointer.save(run)


def fetch(run: Run, groups: Iterator[MicroBatches]) -> MicroBatches | None:
    """Return the next micro-batches; None when there are none or a signal ended the wait."""
    committed, coordinator = run.committed, run.coordinator
    committed.waiting_for_data = not coordinator.distributed or coordinator.before_fetch(run)
    try:
        batches = next(groups, None)
    except Interrupted:
        return None
    finally:
        committed.waiting_for_data = False
    if batches is not None and batches.longer:
        update_length(run)
        run.triggers.update_next(run.progress.step)
    return batches


def evaluate_again(run: Run) -> None:
    """Do the evaluation that a signal cut short before the resume, and what follows one."""
    if evaluate(run) is not None:
        if run.triggers.pop("after_epoch"):
            run.loops.epoch.after_epoch(run)
        if run.checkpointer is not None:
            run.checkpointer.save(run, again=True)


def evaluate(run: Run) -> dict[str, float] | None:
    """Evaluate during training: publish the metrics, and record the best. Training is not changed.

    Modes and random states are as before afterwards, whatever the loop or ``on_eval_end`` did.
    A signal ends the evaluation at its next batch. Then nothing of it is left, and it is requested
    again, for the resume.

    Returns:
        The metrics, by full name; None where a signal ended the evaluation.

    Raises:
        MetricError: ``Checkpoint(best=)`` or a schedule names a metric of evaluations, and this one
            did not give it.
    """
    run.record.since_eval = run.accumulator.take_means(run.strategy.dp.all_gather_object)
    undo = metrics_snapshot(run.task)
    with preserved_modes(run.task, run.strategy.device), measured_set(run.task, "eval"):
        try:
            metrics = run.loops.eval.run(run, run.eval_data)
        except Interrupted:
            undo()
            run.task.log_collector.take_media()
            if run.events.eval_interrupted is not None:
                run.events.eval_interrupted(run)
            run.triggers.request("eval")
            run.outcome.ending = True
            return None
        read_evaluation(run, metrics)
        run.publish(metrics)
        with row_of_its_own(run):
            if run.events.eval_end is not None:
                run.events.eval_end(run, metrics)
    return metrics


@contextmanager
def row_of_its_own(run: Run, *, decides: bool = True) -> Iterator[None]:
    """Inside, logged values make a row of this step, apart from the means of the training steps.

    Every rank enters this, whether it has a listener or not: the ranks exchange their values. The
    row may decide about the best checkpoint and a schedule.

    Args:
        run: the run.
        decides: False after the last checkpoint.
    """
    training, run.accumulator = run.accumulator, MetricAccumulator()
    try:
        yield
    finally:
        logged, run.accumulator = run.accumulator, training
    values = logged.take(run.strategy.dp.all_gather_object)
    if values:
        run.publish(values)
        if decides:
            read_logged(run, values)
