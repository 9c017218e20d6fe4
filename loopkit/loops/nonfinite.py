"""What is told of a step that was not finite: which, on which rank, with which loss and samples."""

from __future__ import annotations

import math

from loopkit.errors import NotFiniteError
from loopkit.run import Run

_SHOWN = 16


def check_finite(run: Run) -> None:
    """Read whether a step since the last look was not finite, on any rank.

    Raises:
        NotFiniteError: under ``on_nan="raise"``, with the first such step, its loss and its
            samples.
    """
    bad = run.strategy.pop_nonfinite_steps()
    if not bad:
        return
    if run.options.on_nan == "skip":
        if run.strategy.rank == 0:  # all ranks skipped the same ones
            run.accumulator.add("train/skipped_steps", bad, reduce="sum")
        return
    progress = run.progress
    assert run.train_loader is not None
    per_step = run.train_loader.step_size()
    first = progress.step_in_epoch - bad
    start, end = first * per_step, (first + 1) * per_step
    ids = run.train_loader.source.samples_at(progress.epoch, start, end)
    shown = ", ".join(map(str, ids[:_SHOWN])) + (
        f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
    )
    # With several optimizers one may have had its update before the next one's loss went bad.
    since = "before that step" if len(run.optimizers) < 2 else "the last update that was finite"
    raise NotFiniteError(
        f"step {progress.step - bad + 1} (epoch {progress.epoch}): {_what(run, bad)}. "
        f"{run.train_loader.source.unit}: {shown}. "
        f"No parameter has changed since {since}. Look at these samples, lower the learning rate, "
        f"clip gradients, "
        "or pass on_nan='skip' to leave such steps out"
    )


def _what(run: Run, bad: int) -> str:
    """What was not finite ``bad`` steps ago, on all ranks."""
    assert run.train_loader is not None
    losses, micro = run.accumulator.values("train/loss"), run.train_loader.accumulate
    mine = losses[-bad * micro :][:micro] if len(losses) >= bad * micro else losses[:micro]
    gathered = run.strategy.world.all_gather_object(mine)
    loss = [pair for each in gathered for pair in each]
    if not loss:
        return "a loss or gradient is not finite"
    if all(weight == 0 for _, weight in loss):
        return f"the loss is {_listed(loss)} with a weight of 0: the step had nothing to train on"
    if all(math.isfinite(value) for value, _ in loss):
        return f"the loss is {_listed(loss)}, finite, but its gradient is not"
    if len(gathered) == 1:
        return f"the loss is {_listed(loss)}"
    wrong = {
        rank: each
        for rank, each in enumerate(gathered)
        if not all(math.isfinite(value) for value, _ in each)
    }
    return "; ".join(f"the loss on rank {rank} is {_listed(each)}" for rank, each in wrong.items())


def _listed(loss: list[tuple[float, float]]) -> str:
    return ", ".join(f"{value:g}" for value, _ in loss)
