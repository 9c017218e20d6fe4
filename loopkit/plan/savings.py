"""What each way to save memory would save: the same plan with one option changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loopkit.errors import LoopkitError
from loopkit.options import Options
from loopkit.plan.planned import planned_run
from loopkit.plan.timeline import Peak
from loopkit.strategies.base import Strategy
from loopkit.strategies.fsdp import FSDP
from loopkit.task import Task


@dataclass(frozen=True)
class Saving:
    """A plan with one change.

    Attributes:
        name: the way to save, such as "precision".
        typed: the options of the change, as they are typed.
        peak: the peak with it; None where it cannot be planned.
        reason: why not; "" otherwise.
    """

    name: str
    typed: str
    peak: Peak | None = None
    reason: str = ""


def savings(
    make_task: Callable[[], Task], options: Options, strategy: Strategy, batch_size: int
) -> Iterator[Saving]:
    """Yield a plan for each change that these options leave to be made.

    Args:
        make_task: makes the task.
        options: the options that were planned.
        strategy: the strategy that they named.
        batch_size: the samples of the micro-batch that was planned.
    """
    for name, typed, changes, size in _changes(options, strategy, batch_size):
        try:
            with planned_run(make_task, Options(**{**vars(options), **changes})) as planned:
                yield Saving(name, typed, planned.peak(size))
        except LoopkitError as error:
            yield Saving(name, typed, None, str(error))


def _changes(
    options: Options, strategy: Strategy, batch_size: int
) -> Iterator[tuple[str, str, Mapping[str, Any], int]]:
    """Yield the name, the typed options, the changed options and the samples of each change."""
    if batch_size > 1 and options.global_batch_size is None:
        halves, count = batch_size // 2, 2 * options.accumulate
        typed = f"--batch-size {halves} --accumulate {count}"
        yield "accumulation", typed, {"batch_size": halves, "accumulate": count}, halves
    if options.activation_checkpointing is None:
        typed = "--activation-checkpointing full"
        yield "activation checkpointing", typed, {"activation_checkpointing": "full"}, batch_size
    for precision in ("bf16", "bf16-true"):
        if options.precision in ("fp32", "tf32", "fp64") or (precision, options.precision) == (
            "bf16-true",
            "bf16",
        ):
            yield "precision", f"--precision {precision}", {"precision": precision}, batch_size
    if isinstance(strategy, FSDP):
        if not strategy.offload:
            changed = copy.copy(strategy)
            changed.offload = True
            typed = "--strategy FSDP --strategy.offload true"
            yield "offload", typed, {"strategy": changed}, batch_size
    elif options.devices not in ("auto", 1) or options.nodes > 1:
        yield "sharding", "--strategy fsdp", {"strategy": "fsdp"}, batch_size
