"""Prepared: a task with its data and optimizers, ready for a loop written by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

from torch import Tensor

from loopkit.cpu_memory import freed_memory_kept
from loopkit.errors import OptionError, TaskError
from loopkit.fit.lifecycle import close_with, errors_reported, only_in_this_thread
from loopkit.fit.setup import new_run, prepare_training, torch_settings, warn_of_batch_norm
from loopkit.loops.check_finite import check_finite
from loopkit.loops.epoch import evaluate
from loopkit.loops.hand_step import HandStep
from loopkit.optim.groups import no_gradient_outside
from loopkit.options import Options
from loopkit.run import Progress, Run
from loopkit.task import Task, name_of

# Those that a loop by hand honours; `epochs` and `steps` tell schedules how long it will be.
_OPTIONS = (
    "strategy", "devices", "nodes", "accelerator", "device_map", "precision", "epochs", "steps", "batch_size",
    "eval_batch_size", "global_batch_size", "accumulate", "clip_norm", "clip_value", "compile",
    "activation_checkpointing", "seed", "data_seed", "deterministic", "rng", "on_nan", "limit_train", "limit_eval",
    "overfit", "eval", "checkpoint", "loggers", "progress", "eval_every",
)  # fmt: skip
_OFF: dict[str, tuple[Any, ...]] = {
    "checkpoint": (True, False),
    "loggers": (("jsonl", "tensorboard"), None, False, ()),
    "progress": ("auto", False),
    "eval_every": ("1 epoch", "never"),
}
_EVENTS = (
    "fit_start", "epoch_start", "step_start", "micro_step_end", "step_end", "log", "epoch_end", "commit", "fit_end",
)  # fmt: skip


class Prepared:
    """What a loop written by hand calls; ``Fit.prepare`` makes it.

    Attributes:
        progress: counts completed passes, steps and samples.
        samples: the samples of the present batch on this rank. It is 0 for a dummy batch, which a
            rank gets when it has run out of data and others have not.
        run: the run below, with ``strategy``, ``optimizers`` and ``schedules``.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._step: HandStep | None = None

    @property
    def progress(self) -> Progress:
        """The counters of completed work."""
        return self.run.progress

    @property
    def samples(self) -> int:
        """The samples of the present batch on this rank."""
        return self._current().size

    def batches(self) -> Iterator[Any]:
        """Yield this rank's batches of the next pass over the data, on its device.

        Every rank gets the same number of batches, and each sample comes once.

        Raises:
            TaskError: the loop left out a part of a step.
        """
        progress, schedules = self.run.progress, self.run.schedules
        for group in self.run.train_loader.open(progress.epoch, progress.position):
            self._step = HandStep(self.run, group, self._step)
            for position, batch in enumerate(group):
                self._step.check_used(position)
                yield batch
            self._step.check_used(len(group))
            if progress.position != group.end:
                raise TaskError("the loop reads on without step(): call it after backward")
        check_finite(self.run)  # what only the device knew so far
        progress.close_epoch()
        for schedule in schedules.values():
            schedule.after_epoch()

    def forward(self, batch: Any, method: str = "train_step") -> Any:
        """Return what the task's method returns for a batch, computed in the precision.

        Args:
            batch: the present batch.
            method: the name of ``train_step`` or of a method of your own.

        Raises:
            TaskError: the method is one of evaluation or prediction.
        """
        return self._current().forward(batch, method)

    def backward(self, loss: Any) -> Tensor:
        """Add the gradients of a loss, weighted so that the step is that of one big batch.

        Args:
            loss: the mean loss of the batch, a scalar; or what ``train_step`` returned, with its
                "weight".

        Returns:
            The loss, detached.

        Raises:
            TaskError: there is no usable loss.
        """
        return self._current().backward(loss)

    def step(self) -> bool:
        """Update the parameters if the last batch completes an optimizer step.

        It clips the gradients, steps optimizers and schedules, and clears the gradients. Under
        ``accumulate=4`` it does so at every fourth call.

        Returns:
            Whether the parameters were updated.

        Raises:
            NotFiniteError: a loss or gradient is not finite, under ``on_nan="raise"``.
        """
        step = self._current()
        if step.index < len(step.batches):
            return False
        step.close()
        return True

    def evaluate(self) -> dict[str, float]:
        """Return the metrics of ``task.eval_data()``; each sample counts once, over all ranks.

        Raises:
            TaskError: the task has nothing to evaluate on.
        """
        if not self.run.eval_data:
            raise TaskError(
                f"{name_of(self.run.task)} has nothing to evaluate on: define eval_data() and "
                "eval_step(batch), and leave eval_every as it is"
            )
        return evaluate(self.run) or {}

    def _current(self) -> HandStep:
        if self._step is None:
            raise TaskError("there is no batch yet: loop over batches()")
        return self._step


@contextmanager
def prepared(task: Task, options: Options) -> Iterator[Prepared]:
    """Inside, strategy, data and optimizers of a task are open.

    Raises:
        OptionError: an option, or an event of the task, that a loop by hand would pass over.
    """
    _check_options(options)
    run = new_run(task, options)
    _check_events(run)
    with only_in_this_thread(), ExitStack() as resources, errors_reported(run):
        close_with(resources, run)
        prepare_training(run)
        if getattr(run.train_loader.source, "uneven", False):
            raise OptionError(
                "Loader(sharded=True) lets ranks run out of data at different times, which a loop by "
                "hand cannot meet: leave sharded out, or train with Fit.run"
            )
        resources.enter_context(no_gradient_outside(run.task, list(run.optimizers.values())))
        with torch_settings(options), freed_memory_kept(run.strategy.device):
            if run.events.setup is not None:
                run.events.setup(run)
            warn_of_batch_norm(run)
            yield Prepared(run)


def _check_options(options: Options) -> None:
    for option in fields(options):
        value = getattr(options, option.name)
        if option.name in _OFF:
            passed_over = value not in _OFF[option.name]
        else:
            passed_over = option.name not in _OPTIONS and value != option.default
        if passed_over:
            raise OptionError(
                f"{option.name}={value!r} is part of Fit's own loop, and a loop by hand would pass "
                "over it: train with Fit.run, or leave it out and do it in your loop"
            )


def _check_events(run: Run) -> None:
    for event in _EVENTS:
        if getattr(run.events, event) is not None:
            raise OptionError(
                f"{name_of(run.task)}.on_{event} would not be called in a loop by hand: train with "
                "Fit.run, or do it in your loop"
            )
