"""EpochLoop: one pass over the training data, step by step, with what is due in between.

    for each group of micro-batches:
        on_step_start; one step; count it; on_step_end
        where something is due: log, close the epoch, evaluate
        on_commit: all state agrees; where due, save
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

from loopkit.errors import DataError, MetricError, NotFiniteError, nearest
from loopkit.run import Interrupted, Run

_SHOWN = 16


class EpochLoop:
    """One pass over the data, from wherever the progress stands."""

    def run(self, run: Run) -> None:
        """Go through the rest of the epoch; returns early when the run is to stop.

        Raises:
            NotFiniteError: under ``on_nan="raise"``, naming the step and its samples.
            DataError: the data gave no batch.
        """
        progress, events, agenda, strategy, timings = run.progress, run.events, run.agenda, run.strategy, run.timings
        assert run.feed is not None
        step, world = run.loops.step, run.strategy.world_size
        if events.epoch_start is not None:
            events.epoch_start(run)
        agenda.look_ahead(progress.step)
        groups = iter(run.feed.open(progress.epoch, progress.position))
        while True:
            began = perf_counter()
            try:
                run.fetching = True
                batches = next(groups, None)
            except Interrupted:
                self.leave(run)
                return
            finally:
                run.fetching = False
            timings.data += perf_counter() - began
            if batches is None:
                break
            if events.step_start is not None:
                events.step_start(run, batches)
            out = step.run(run, batches)
            bad = strategy.close_step()
            progress.count(batches, world)
            if bad:
                check_finite(run)
            run.data_state = batches.state
            if events.step_end is not None:
                events.step_end(run, out)
            timings.steps += 1
            if progress.step < agenda.next and not batches.last:
                if events.commit is not None:
                    events.commit(run)
                timings.total += perf_counter() - began
                continue
            timings.total += perf_counter() - began
            if self.boundary(run, epoch_is_over=batches.last):
                return
        if progress.step_in_epoch == 0:
            raise DataError(f"{type(run.task).__name__}.train_data() gave no batch in epoch {progress.epoch}: "
                            "there is nothing to train on")  # fmt: skip
        self.boundary(run, epoch_is_over=True, between_steps=True)

    def leave(self, run: Run) -> None:
        """A signal broke off the wait for data: save the state of the last commit."""
        run.stopping = True
        run.tick()
        if run.saver is not None:
            check_finite(run)
            run.saver.save(run)

    def boundary(self, run: Run, *, epoch_is_over: bool, between_steps: bool = False) -> bool:
        """Do what is due after the step just counted; returns whether this pass is to be left.

        ``between_steps`` says that the step was dealt with before, and only then its pass turned out to be over.
        """
        progress, events, agenda = run.progress, run.events, run.agenda
        run.tick()
        ended = progress.epoch + 1 if epoch_is_over else None
        due = agenda.take(progress.step, progress.seconds, ended, again=between_steps)
        epoch_is_over = epoch_is_over or "end_epoch" in due
        check_finite(run)
        run.running.compact()
        if epoch_is_over:
            progress.close_epoch()
            run.data_state = None
        run.stopping = run.stopping or "stop" in due
        closing = run.finished() and run.status == "finished"  # a run cut short logs nothing it would not have logged
        if "log" in due or (closing and len(run.running)):
            run.log_now()
        if epoch_is_over and events.epoch_end is not None:
            events.epoch_end(run)
        if run.evaluation and ("eval" in due or (closing and run.options.eval_every != "never")):
            evaluate(run)
        if events.commit is not None and not between_steps:
            events.commit(run)
        if run.saver is not None:
            asked = agenda.forget("save")  # by the evaluation just done; what is saved now is that, due or not
            if asked or "save" in due or run.finished() or agenda.asked("stop"):
                run.saver.save(run)
            run.saver.poll(run)
        run.stopping = run.stopping or agenda.asked("stop")
        agenda.look_ahead(progress.step)
        return epoch_is_over or run.finished()


def evaluate(run: Run) -> None:
    """Evaluate in the midst of training, leaving no trace in it, publish the metrics and note the best.

    Raises:
        MetricError: ``Checkpoint(best=)`` names a metric that the evaluation did not give.
    """
    metrics = run.loops.eval.run(run, run.evaluation)
    run.measured_at = run.progress.step
    note_best(run, metrics)
    for schedule in run.schedules.values():
        schedule.after_eval(metrics)
    run.publish(metrics)
    if run.events.eval_end is not None:
        run.events.eval_end(run, metrics)


def note_best(run: Run, metrics: Mapping[str, float]) -> None:
    """Ask for a checkpoint where the metric that decides is better than ever before."""
    saves = run.options.saves()
    wanted = saves.metric() if saves is not None else None
    if wanted is None:
        return
    name, side = wanted
    if name not in metrics:
        raise MetricError(f"Checkpoint(best='{name}:{side}'): the evaluation gave no {name!r}."
                          f"{nearest(name, metrics)} It gave {', '.join(sorted(metrics))}")  # fmt: skip
    value, best = metrics[name], run.best.get("value")
    if best is None or (value > best if side == "max" else value < best):
        run.best = {"metric": name, "value": value, "step": run.progress.step, "epoch": run.progress.epoch}
        run.agenda.ask("save")


def check_finite(run: Run) -> None:
    """Read whether a step since the last look was not finite.

    Raises:
        NotFiniteError: under ``on_nan="raise"``, with the first such step, its loss and its samples.
    """
    bad = run.strategy.take_bad_steps()
    if not bad:
        return
    if run.options.on_nan == "skip":
        run.running.add("train/skipped_steps", bad, reduce="sum")
        return
    progress = run.progress
    assert run.feed is not None
    per_step = run.feed.step_size()
    first = progress.step_in_epoch - bad
    start, end = first * per_step, (first + 1) * per_step
    ids = run.feed.source.samples_at(progress.epoch, start, end)
    shown = ", ".join(map(str, ids[:_SHOWN])) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")
    losses = run.running.values("train/loss")
    micro = run.feed.accumulate
    loss = losses[-bad * micro :][:micro] if len(losses) >= bad * micro else losses[:micro]
    what = f"the loss is {', '.join(f'{value:g}' for value, _ in loss)}" if loss else "a loss or gradient is not finite"
    if loss and all(weight == 0 for _, weight in loss):
        what += " with a weight of 0: the step had nothing to train on"
    elif loss and all(abs(value) < float("inf") for value, _ in loss):
        what += ", finite, but its gradient is not"
    # With several optimizers one may have had its update before the next one's loss went bad.
    since = "before that step" if len(run.optimizers) < 2 else "the last update that was finite"
    raise NotFiniteError(
        f"step {progress.step - bad + 1} (epoch {progress.epoch}): {what}. {run.feed.source.unit}: {shown}. "
        f"No parameter has changed since {since}. Look at these samples, lower the learning rate, clip gradients, "
        "or pass on_nan='skip' to leave such steps out"
    )
