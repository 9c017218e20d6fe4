"""``loopkit fit``: train a task."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from loopkit.cli.args.request import Command, read_request
from loopkit.distributed.environment import is_rank_zero

INTERRUPTED = 130

FIT = Command(
    "fit", "Train a task. Progress goes to stderr, the summary of the result to stdout.", {}
)


def run(argv: Sequence[str]) -> int:
    """Train the target; return the exit code."""
    request = read_request(FIT, argv)
    if request is None:
        return 0
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    result = fit.run(task)
    interrupted = result.status == "interrupted"
    if is_rank_zero():
        print(result.summary())
        if interrupted and result.checkpoint is not None:
            print(
                f"loopkit: interrupted at step {result.step}. "
                f"To continue, add: --run-dir {result.run_dir} --resume auto",
                file=sys.stderr,
            )
    return INTERRUPTED if interrupted else 0
