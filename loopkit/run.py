"""Run: everything alive during one run, passed to loops and hooks; and Progress, what is completed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch.optim import Optimizer

from loopkit.data.micro_batches import MicroBatches, MicroBatchLoader
from loopkit.durations import RunLength
from loopkit.errors import OptionError
from loopkit.events import Events, Hook
from loopkit.loggers.base import Loggers
from loopkit.metrics.accumulator import MetricAccumulator
from loopkit.strategies.base import Strategy
from loopkit.task import Task
from loopkit.triggers import SyncSchedule, Triggers

if TYPE_CHECKING:
    from loopkit.optim.lr_schedulers import BoundSchedule

Request = Literal["eval", "save", "log", "end_epoch"]
REQUESTS = ("eval", "save", "log", "end_epoch")


class Interrupted(BaseException):
    """A signal came while the run waited for data; everything stands as of the last committed step."""


@dataclass(slots=True)
class Progress:
    """Counters of completed things only.

    Attributes:
        epoch: complete passes over the data.
        step: optimizer steps.
        step_in_epoch: optimizer steps since the pass began.
        position: how far into the pass the data is read, in samples (in batches for iterables), all
            ranks.
        samples, tokens: seen in all; tokens where batches carry ``input_ids``, those of other ranks
            as of the last log, evaluation or save at the latest.
        seconds: spent training, evaluation and saving included, over all resumes.
    """

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    position: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def count(self, batches: MicroBatches) -> None:
        """One optimizer step over ``batches`` is complete."""
        self.step += 1
        self.step_in_epoch += 1
        self.position = batches.end
        self.samples += batches.total
        self.tokens += batches.tokens

    def close_epoch(self) -> None:
        """A pass is complete: the end of an epoch is the start of the next."""
        self.epoch += 1
        self.step_in_epoch = 0
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        """The counters by name."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        for counter in fields(self):
            setattr(self, counter.name, state[counter.name])


@dataclass(slots=True)
class Timings:
    """Host seconds of a run's steps, in all and by part: the data, the user's step with its
    backward, the update.
    """

    data: float = 0.0
    compute: float = 0.0
    update: float = 0.0
    total: float = 0.0
    steps: int = 0

    def per_step(self) -> dict[str, float]:
        """Microseconds per step by part; "framework" is what is left of "step", the whole."""
        each = 1e6 / max(1, self.steps)
        parts = {
            "data": self.data * each,
            "compute": self.compute * each,
            "update": self.update * each,
        }
        whole = self.total * each
        return parts | {"framework": whole - sum(parts.values()), "step": whole}


@dataclass
class Loops:
    """The four loops of a run, each replaceable."""

    step: Any
    epoch: Any
    eval: Any
    predict: Any


@dataclass
class Run:
    """Everything alive during one run. Loops and hooks get it as an argument; nothing stores it."""

    task: Task
    strategy: Strategy
    options: Any
    length: RunLength
    triggers: Triggers
    events: Events
    loops: Loops
    hooks: list[Hook] = field(default_factory=list)
    loggers: Loggers = field(default_factory=Loggers)
    train_loader: MicroBatchLoader | None = None
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    optimizers: dict[str, Optimizer] = field(default_factory=dict)
    schedules: dict[str, BoundSchedule] = field(default_factory=dict)
    checkpointer: Any = None
    run_dir: Path | None = None
    seed: int | None = None
    progress: Progress = field(default_factory=Progress)
    accumulator: MetricAccumulator = field(default_factory=MetricAccumulator)
    sync_schedule: SyncSchedule = field(default_factory=SyncSchedule)
    timings: Timings = field(default_factory=Timings)
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    resumed_from: Path | None = None
    waiting_for_data: bool = False  # waiting for data, with all state as of the last commit
    last_eval_step: int = -1  # the step of the last evaluation
    status: str = "finished"
    reason: str = ""
    requested_end: tuple[str, str] | None = (
        None  # the status and reason of a stop that this rank asked for
    )
    stopping: bool = False
    data_position: Any = None
    rng_state_at_commit: dict[str, Any] | None = (
        None  # torch's streams as of the last commit, where data was drawn since
    )
    micro_batch_splits: int = (
        1  # in how many parts a micro-batch is taken, under micro_batch="auto"
    )
    unit: float | None = None  # what all ranks' weights are taken relative to
    divisor: Any = None  # what the gradients of the step under way are still to be divided by
    _clock: Callable[[], float] = time.perf_counter
    _started: float = 0.0

    def log(self, values: Mapping[str, Any]) -> None:
        """Log scalars (numbers or scalar tensors) under their full names, at the next log, averaged
        until then.
        """
        for name, value in values.items():
            self.accumulator.add(name, value)

    def stop(self, reason: str) -> None:
        """End training after this step, with a last evaluation left out and the last checkpoint
        saved.
        """
        self.end("stopped", reason)

    def end(self, status: str, reason: str) -> None:
        """As ``stop``, with the status that the result is to have."""
        self.requested_end = status, reason
        if self.strategy.world_size == 1:  # else it holds once all ranks know of it
            self.status, self.reason = status, reason
        self.triggers.request("stop")

    def request(self, what: Request) -> None:
        """Ask for an evaluation, a checkpoint, a log or the end of the epoch at the end of this
        step.

        Raises:
            OptionError: nothing of that name can be asked for.
        """
        if what not in REQUESTS:
            raise OptionError(f"run.request({what!r}): give one of {', '.join(REQUESTS)}")
        if what == "eval" and not self.evaluation:
            raise OptionError(
                "run.request('eval'): nothing to evaluate on: define eval_data and eval_step "
                "on the task, and leave eval_every='never' out"
            )
        self.triggers.request(what)

    def seconds(self) -> float:
        """Seconds of training so far, this moment included."""
        return self.progress.seconds + (self._clock() - self._started if self._started else 0.0)

    def start_clock(self) -> None:
        """Training starts now."""
        self._started = self._clock()

    def tick(self) -> None:
        """Bring ``progress.seconds`` up to this moment."""
        self.progress.seconds, self._started = self.seconds(), self._clock()

    def publish(self, values: Mapping[str, float]) -> None:
        """Hand plain numbers to the hooks and loggers as a row of the present step."""
        self.metrics.update(values)
        self.history.append({**values, "step": self.progress.step})
        if self.events.log is not None:
            self.events.log(self, values)
        self.loggers.log(values, self.progress.step)

    def log_now(self) -> None:
        """Publish what has been collected since the last log: averages, learning rates, the epoch
        as a number.
        """
        values = self.accumulator.take(self.strategy.dp.all_gather_object)
        rates = {
            f"lr/{name}": optimizer.param_groups[0]["lr"]
            for name, optimizer in self.optimizers.items()
        }
        values |= {"lr": next(iter(rates.values()))} if len(rates) == 1 else rates
        per_epoch, progress = self.length.steps_per_epoch, self.progress
        values["epoch"] = progress.epoch + (
            progress.step_in_epoch / per_epoch if per_epoch else 0.0
        )
        self.publish(values)

    def finished(self) -> bool:
        """Whether the run has come to its end: by its length, its time or a request."""
        length, progress = self.length, self.progress
        return (
            self.stopping
            or (length.steps is not None and progress.step >= length.steps)
            # Where an epoch's length is known, epochs are counted in steps.
            or (
                length.epochs is not None
                and None in (length.steps, length.steps_per_epoch)
                and progress.epoch >= length.epochs
            )
            or (
                length.seconds is not None
                and progress.step > 0
                and progress.seconds >= length.seconds
            )
        )
