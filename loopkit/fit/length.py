"""The length of a run, and the triggers, schedules and cadences that follow it."""

from __future__ import annotations

import logging
import math
from fractions import Fraction
from typing import Any

from loopkit.data.micro_batches import MicroBatchLoader
from loopkit.durations import Cadence, Duration, RunLength, Start
from loopkit.errors import OptionError
from loopkit.options import Options
from loopkit.run import Progress, Run
from loopkit.triggers import Triggers

logger = logging.getLogger(__name__)


def run_length(options: Options, loader: MicroBatchLoader, progress: Progress) -> RunLength:
    """Return how long the run is, as far as it is known, as seen from its progress.

    Raises:
        OptionError: a fraction of an epoch is asked for, and the data has no length.
    """
    per_epoch, epochs = loader.steps_per_epoch(), options.epochs
    if epochs is None and options.steps is None and options.time is None:
        epochs = 1
    if epochs is not None and per_epoch is None and epochs != int(epochs):
        raise OptionError(f"epochs={epochs} needs data with a length: give steps=")
    limits = [options.steps] if options.steps is not None else []
    offset = 0
    if per_epoch is not None:
        expected = progress.epoch * per_epoch + loader.steps_before(progress.position)
        offset = progress.step - expected
        if epochs is not None:
            limits.append(math.ceil(Fraction(str(epochs)) * per_epoch) + offset)
    return RunLength(
        steps_per_epoch=per_epoch,
        steps=min(limits) if limits else None,
        epochs=epochs,
        seconds=options.seconds(),
        max_steps=options.steps,
        offset=offset,
        epoch=progress.epoch,
    )


def build_triggers(options: Options, length: RunLength) -> Triggers:
    """Return the triggers of logs, evaluations, saves and the end."""
    every: dict[str, Any] = {
        "log": (options.log_every, "log_every"),
        "eval": (options.eval_every, "eval_every"),
    }
    saves = options.saves()
    if saves is not None:
        every["save"] = (saves.every, "Checkpoint(every=)")
    cadences = {
        name: Cadence(Duration.parse(value, option), length, option)
        for name, (value, option) in every.items()
    }
    if options.eval_after is not None:
        evaluations = cadences["eval"]
        evaluations.start = Start.parse(options.eval_after, "eval_after", length, evaluations.every)
    # Step 1 is always logged.
    return Triggers(cadences, length.steps, stop_seconds=length.seconds, first=["log"])


def update_length(run: Run) -> None:
    """Compute the length of the run again, and have triggers and schedules follow it.

    It changes when a resumed run reads other batches than before, and when a pass had another
    number of steps than the length of its data says. Schedules by epochs follow each pass.
    """
    length = run_length(run.options, run.train_loader, run.progress)
    if length != run.length:
        logger.debug("the length of the run is now %s", length)
        run.triggers.set_length(length)
    run.length = length
    for schedule in run.schedules.values():
        schedule.set_length(length)
