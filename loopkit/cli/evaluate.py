"""``loopkit evaluate``: measure a task on its evaluation data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from loopkit.cli.args.request import CHECKPOINT, Command, read_request
from loopkit.cli.args.tokens import take_flag
from loopkit.console.text import columns, number
from loopkit.distributed.environment import is_rank_zero

OPTIONS = {
    **CHECKPOINT,
    "--json": "print the metrics as one JSON object; NaN and infinities are strings",
}
EVALUATE = Command(
    "evaluate",
    "Measure a task on its evaluation data and print the metrics.",
    OPTIONS,
    hidden=("checkpoint",),
    examples=("--checkpoint runs/first", "--checkpoint runs/first --json"),
)


def run(argv: Sequence[str]) -> int:
    """Evaluate the target; return the exit code."""
    return measure(EVALUATE, argv)


def measure(command: Command, argv: Sequence[str]) -> int:
    """Call the method of ``Fit`` that has the command's name, and print the metrics.

    Returns:
        The exit code.
    """
    request = read_request(command, argv)
    if request is None:
        return 0
    as_json = take_flag(request.tokens, "json")
    checkpoint = request.take_checkpoint()
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    metrics = getattr(fit, command.name)(task, checkpoint=checkpoint)
    if is_rank_zero():
        print(json.dumps(to_json(metrics)) if as_json else "\n".join(table(metrics)))
    return 0


def table(metrics: Mapping[str, float]) -> list[str]:
    """Return a line for each metric, with the values aligned."""
    rows = [[name, number(value)] for name, value in metrics.items()]
    return columns(rows, [False, True]) if rows else []


def to_json(value: Any) -> Any:
    """Return the value as strict JSON has it: NaN and infinities become "nan", "inf", "-inf"."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
