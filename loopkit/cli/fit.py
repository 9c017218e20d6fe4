"""``loopkit fit``: train a task."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loopkit.cli.args.request import Command, read_request
from loopkit.distributed.environment import is_rank_zero
from loopkit.result import Result

INTERRUPTED = 130

FIT = Command(
    "fit", "Train a task. Progress goes to stderr, the summary of the result to stdout.", {}
)


def run(argv: Sequence[str]) -> int:
    """Train the target; the exit code."""
    request, _ = read_request(FIT, argv)
    if request is None:
        return 0
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    result = fit.run(task)
    if is_rank_zero():
        print(result.summary())
    if result.status != "interrupted":
        return 0
    if is_rank_zero() and result.checkpoint is not None:
        print(_how_to_go_on(result, argv), file=sys.stderr)
    return INTERRUPTED


def _how_to_go_on(result: Result, argv: Sequence[str]) -> str:
    return f"loopkit: interrupted at step {result.step}. To go on, add: --run-dir {result.run_dir} --resume auto"
