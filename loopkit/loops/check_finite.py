"""Report a step that was not finite: which step, on which rank, with which loss and samples."""

from __future__ import annotations

import math

from loopkit.errors import NotFiniteError
from loopkit.run import Run

_SHOWN = 16


def check_finite(run: Run) -> None:
    """Read whether any step since the last check was not finite, on any rank.

    Raises:
        NotFiniteError: under ``on_nan="raise"``, with the first such step, its loss and samples.
    """
    count = run.strategy.pop_nonfinite_steps()
    if not count:
        return
    if run.options.on_nan == "skip":
        if run.strategy.rank == 0:  # all ranks skipped the same steps
            run.accumulator.add("train/skipped_steps", count, reduce="sum")
        return
    step, samples = place_of(run, count)
    # With several optimizers, one may have stepped before the loss of the next one went bad.
    since = "before that step" if len(run.optimizers) < 2 else "the last update that was finite"
    raise NotFiniteError(
        f"{step}: {_problem(run, count)}. {samples}. No parameter has changed since {since}. "
        "Look at these samples, lower the learning rate, clip gradients, or pass on_nan='skip' to "
        "leave such steps out"
    )


def place_of(run: Run, back: int) -> tuple[str, str]:
    """Return the number of a step and the samples of all ranks in it, for messages.

    Args:
        run: the run.
        back: how many completed steps ago it began; 0 for the step in work.
    """
    progress, loader = run.progress, run.train_loader
    first = progress.step_in_epoch - back
    start, end = first * loader.stride(), (first + 1) * loader.stride()
    ids = loader.source.samples_at(progress.epoch, start, end)
    shown = ", ".join(map(str, ids[:_SHOWN]))
    if len(ids) > _SHOWN:
        shown += f" and {len(ids) - _SHOWN} more"
    return (
        f"step {progress.step - back + 1} (epoch {progress.epoch})",
        f"{loader.source.unit}: {shown}",
    )


def _problem(run: Run, count: int) -> str:
    """Return what was not finite ``count`` steps ago, over all ranks."""
    losses, accumulate = run.accumulator.values("train/loss"), run.train_loader.accumulate
    start = len(losses) - count * accumulate
    local = losses[max(0, start) :][:accumulate]
    gathered = run.strategy.world.all_gather_object(local)
    loss = [pair for of_rank in gathered for pair in of_rank]
    if not loss:
        return "a loss or gradient is not finite"
    if all(weight == 0 for _, weight in loss):
        return f"the loss is {_listed(loss)} with a weight of 0: the step had nothing to train on"
    if all(math.isfinite(value) for value, _ in loss):
        return f"the loss is {_listed(loss)}, finite, but its gradient is not"
    if len(gathered) == 1:
        return f"the loss is {_listed(loss)}"
    return "; ".join(
        f"the loss on rank {rank} is {_listed(of_rank)}"
        for rank, of_rank in enumerate(gathered)
        if not all(math.isfinite(value) for value, _ in of_rank)
    )


def _listed(loss: list[tuple[float, float]]) -> str:
    return ", ".join(f"{value:g}" for value, _ in loss)
