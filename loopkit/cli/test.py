"""``loopkit test``: measure a task on its test data."""

from __future__ import annotations

from collections.abc import Sequence

from loopkit.cli.args.request import Command
from loopkit.cli.evaluate import OPTIONS, measure

TEST = Command(
    "test",
    "Measure a task on its test data and print the metrics.",
    OPTIONS,
    hidden=("checkpoint",),
)


def run(argv: Sequence[str]) -> int:
    """Test the target; return the exit code."""
    return measure(TEST, argv)
