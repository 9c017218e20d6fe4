"""Run: everything alive during one run, passed to loops and hooks; Progress: completed work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from loopkit.data.micro_batches import MicroBatches, MicroBatchLoader
from loopkit.data.sources import Source
from loopkit.durations import RunLength
from loopkit.errors import OptionError
from loopkit.events import Announcer, Events, Hook
from loopkit.loggers.base import Loggers
from loopkit.loggers.media import LogsMedia, Media
from loopkit.metrics.accumulator import MetricAccumulator
from loopkit.options import Options
from loopkit.strategies.base import Strategy
from loopkit.task import Task
from loopkit.task_changes import TaskAtStart
from loopkit.timings import Stopwatch, Timings
from loopkit.triggers import Triggers

if TYPE_CHECKING:
    from loopkit.fit.checkpointer import Checkpointer
    from loopkit.loops import EpochLoop, EvalLoop, PredictLoop, StepLoop
    from loopkit.loops.coordination import Coordinator
    from loopkit.optim.lr_schedulers import BoundSchedule

Request = Literal["eval", "save", "log", "end_epoch"]
REQUESTS = ("eval", "save", "log", "end_epoch")


class Interrupted(BaseException):
    """Raised by a signal while the run waits for data; all state is that of the last commit."""


@dataclass(slots=True)
class Progress:
    """Count completed work only.

    Attributes:
        epoch: complete passes over the data.
        step: optimizer steps.
        step_in_epoch: optimizer steps since the pass began.
        position: the position in the data of this pass, over all ranks, in samples (in batches for
            iterables).
        samples: samples seen on all ranks.
        tokens: tokens seen on all ranks, where batches carry ``input_ids``. Those of other ranks
            are included at the latest at the next log, evaluation or save.
        seconds: seconds of training over all resumes, with evaluating and saving.
        passes: the backward passes of the step in work, by method of the task. Not saved.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    position: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    passes: dict[str, int] = field(default_factory=dict, repr=False)

    def count(self, batches: MicroBatches) -> None:
        """Count one optimizer step over ``batches``."""
        self.step += 1
        self.step_in_epoch += 1
        self.position = batches.end
        self.samples += batches.total
        self.tokens += batches.tokens
        self.passes = {}

    def close_epoch(self) -> None:
        """Count one pass: the end of an epoch is the start of the next."""
        self.epoch += 1
        self.step_in_epoch = 0
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the counters by name."""
        counters = asdict(self)
        del counters["passes"]
        return counters

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counters that ``state_dict`` returned."""
        for name in self.state_dict():
            setattr(self, name, state[name])


@dataclass
class Loops:
    """The four loops of a run. Each can be replaced by any object with the same ``run`` method."""

    step: StepLoop
    epoch: EpochLoop
    eval: EvalLoop
    predict: PredictLoop

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loops that keep any, by name."""
        stateful = {name: loop for name, loop in vars(self).items() if hasattr(loop, "state_dict")}
        return {name: loop.state_dict() for name, loop in stateful.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""
        for name, saved in state.items():
            loop = getattr(self, name)
            if hasattr(loop, "load_state_dict"):
                loop.load_state_dict(saved)


@dataclass
class Record:
    """Everything that a run has measured.

    Attributes:
        metrics: the latest value of every name that was logged.
        history: one row of values per log and evaluation, each with its "step".
        best: metric, value, step and epoch of the best evaluation; empty before the first.
        since_eval: the means of training values from one evaluation to the next; in
            ``on_eval_end``, those of the steps before this evaluation.
        logged_at: the step at which each name was logged last.
        timings: host seconds of the steps.
        resumed_from: the checkpoint that the run was resumed from.
        warned: what warnings were about, so that each comes once.
        class_names: the names of the classes that the last evaluation measured; empty if it has none.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    since_eval: dict[str, float] = field(default_factory=dict)
    logged_at: dict[str, int] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)
    resumed_from: Path | None = None
    warned: set[str] = field(default_factory=set)
    class_names: list[str] = field(default_factory=list)


@dataclass
class Committed:
    """The state as of the last commit that the counters do not tell.

    Attributes:
        data: the data source's own state after the last step, for sources that have one.
        rng_state: torch's random state as of the last commit, where the fetch of the next batches
            has drawn from it since.
        waiting_for_data: whether the run waits for batches. All state is that of the last commit.
    """

    data: Any = None
    rng_state: dict[str, Any] | None = None
    waiting_for_data: bool = False


@dataclass
class Outcome:
    """The end of a run.

    Attributes:
        status: "finished", "stopped" or "interrupted".
        reason: the reason of a stop, in words.
        ending: whether the run ends at the next boundary between steps.
    """

    status: str = "finished"
    reason: str = ""
    ending: bool = False


@dataclass
class Run(LogsMedia):
    """Everything alive during one run. Loops and hooks get it as an argument; nothing stores it.

    Attributes:
        task, strategy, options: what the user gave, and the strategy that the options name.
        length: how long the run is, as far as it is known: ``length.steps``,
            ``length.steps_per_epoch`` and ``length.epochs``, each None where it is not known.
        triggers: which action is due at which step.
        coordinator: exchanges requests with the other ranks.
        events: the listeners of each event.
        loops: the step, epoch, eval and predict loop.
        hooks: the listeners in order, those of loopkit itself last.
        loggers: the loggers of this rank; only rank 0 has any.
        loader: the training data; None in a run that only evaluates or predicts.
        eval_data: the evaluation sets by name; the only one may be called "".
        optimizers, schedules: by name.
        at_start: the task as it was when the optimizers were made.
        checkpointer: saves checkpoints; None where nothing is saved.
        run_dir: the directory of the run, on this machine; None in a run that only evaluates or
            predicts.
        seed: the seed under ``rng="counter"``; None under ``rng="stream"``.
        progress: completed work.
        accumulator: values logged since the last log.
        stopwatch: measures the seconds of training.
        record: everything measured.
        committed: the state as of the last commit that the counters do not tell.
        outcome: the end of the run.
        screen: shows a line at once, as a signal handler needs it; the progress display, if any.
    """

    task: Task
    strategy: Strategy
    options: Options
    length: RunLength
    triggers: Triggers
    coordinator: Coordinator
    events: Events
    loops: Loops
    hooks: list[Hook] = field(default_factory=list)
    loggers: Loggers = field(default_factory=Loggers)
    loader: MicroBatchLoader | None = None
    eval_data: Mapping[str, Source] = field(default_factory=dict)
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    schedules: dict[str, BoundSchedule] = field(default_factory=dict)
    at_start: TaskAtStart = field(default_factory=TaskAtStart)
    checkpointer: Checkpointer | None = None
    run_dir: Path | None = None
    seed: int | None = None
    progress: Progress = field(default_factory=Progress)
    accumulator: MetricAccumulator = field(default_factory=MetricAccumulator)
    stopwatch: Stopwatch = field(default_factory=Stopwatch)
    record: Record = field(default_factory=Record)
    committed: Committed = field(default_factory=Committed)
    outcome: Outcome = field(default_factory=Outcome)
    screen: Announcer = field(default_factory=Announcer)

    @property
    def train_loader(self) -> MicroBatchLoader:
        """The training data.

        Raises:
            RuntimeError: the run only evaluates or predicts.
        """
        if self.loader is None:
            raise RuntimeError("this run has no training data: it only evaluates or predicts")
        return self.loader

    @property
    def rank(self) -> int:
        """The number of this process among all that train together; 0 logs and writes files."""
        return self.strategy.rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.strategy.world_size

    @property
    def metrics(self) -> dict[str, float]:
        """The latest value of every name that was logged."""
        return self.record.metrics

    @property
    def history(self) -> list[dict[str, float]]:
        """One row of values per log and evaluation, each with its "step"."""
        return self.record.history

    def log(self, values: Mapping[str, Any]) -> None:
        """Log scalars under their full names. The next log shows their mean.

        Args:
            values: numbers or scalar tensors by name.
        """
        for name, value in values.items():
            self.accumulator.add(name, value)

    def stop(self, reason: str) -> None:
        """End training after this step. The state is saved; no last evaluation is done."""
        self.end("stopped", reason)

    def end(self, status: str, reason: str, *, agreed: bool = False) -> None:
        """End training after this step with ``status`` and ``reason``.

        Args:
            status: "stopped" or "interrupted".
            reason: the reason, in words.
            agreed: True if every rank makes this call at the same point. The run then ends without
                a control message.
        """
        if agreed:
            self.outcome = Outcome(status, reason, ending=True)
        else:
            self.coordinator.request_end(self, status, reason)

    def request(self, what: Request) -> None:
        """Request an evaluation, a checkpoint, a log or the end of the epoch after this step.

        Raises:
            OptionError: ``what`` is unknown, or the run has nothing to evaluate on.
        """
        if what not in REQUESTS:
            raise OptionError(f"run.request({what!r}): give one of {', '.join(REQUESTS)}")
        if what == "eval" and not self.eval_data:
            raise OptionError(
                "run.request('eval'): nothing to evaluate on: define eval_data and eval_step "
                "on the task, and leave eval_every='never' out"
            )
        self.coordinator.request(self, what)

    def seconds(self) -> float:
        """Return the seconds of training so far, including the current step."""
        return self.progress.seconds + self.stopwatch.elapsed()

    def epochs_done(self) -> float:
        """Return the passes over the data so far, with a part of the current one."""
        per_epoch, progress = self.length.steps_per_epoch, self.progress
        if not per_epoch or not progress.step_in_epoch:
            return float(progress.epoch)
        steps = progress.step - self.length.offset - progress.epoch * per_epoch
        return progress.epoch + min(max(steps, 0), per_epoch) / per_epoch

    def publish(self, values: Mapping[str, float]) -> None:
        """Give plain numbers to the hooks and loggers, as a row of the current step."""
        self.record.metrics.update(values)
        self.record.logged_at.update(dict.fromkeys(values, self.progress.step))
        self.record.history.append({**values, "step": self.progress.step})
        if self.events.log is not None:
            self.events.log(self, values)
        self.loggers.log(values, self.progress.step)
        if self.task.log_collector.media:
            for media in self.task.log_collector.take_media():
                self._log_media(media)

    def _log_media(self, media: Media) -> None:
        """Give an image and so on to the loggers, at the current step."""
        self.loggers.log_media(media, self.progress.step)

    def logger(self, name: str) -> Any:
        """Return the logger called ``name``; ``run.logger("tensorboard").experiment`` is its own object.

        On other ranks than rank 0, all that is called on it does nothing.

        Raises:
            OptionError: the run has no such logger.
        """
        return self.loggers.named(name)

    def log_now(self) -> dict[str, float]:
        """Publish the means since the last log, the learning rates, and the epoch as a number.

        Returns:
            The row.
        """
        values = self.accumulator.take(self.strategy.dp.all_gather_object)
        rates = {
            f"lr/{name}": optimizer.param_groups[0]["lr"]
            for name, optimizer in self.optimizers.items()
        }
        values |= {"lr": next(iter(rates.values()))} if len(rates) == 1 else rates
        values["epoch"] = self.epochs_done()
        self.publish(values)
        return values

    def finished(self) -> bool:
        """Return whether the run is at its end: by its length, its time limit or a request."""
        length, progress = self.length, self.progress
        if self.outcome.ending:
            return True
        if length.seconds is not None and progress.step > 0 and progress.seconds >= length.seconds:
            return True
        return length.finished(progress.epoch, progress.step)
