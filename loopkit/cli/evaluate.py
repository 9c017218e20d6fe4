"""``loopkit evaluate``: measure a task on its evaluation data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loopkit.cli.args import saved
from loopkit.cli.args.request import Command, read_request
from loopkit.cli.args.tokens import take_flag
from loopkit.console.text import columns, number
from loopkit.distributed.environment import is_rank_zero

EVALUATE = Command(
    "evaluate",
    "Measure a task on its evaluation data and print the metrics.",
    {
        **saved.ABOUT,
        "--json": "print the metrics as one JSON object; NaN and infinities are strings",
    },
    hidden=("checkpoint",),
)


def run(argv: Sequence[str]) -> int:
    """Evaluate the target; the exit code."""
    request, words = read_request(EVALUATE, argv)
    if request is None:
        return 0
    as_json = take_flag(words, "json")
    checkpoint = saved.take_checkpoint(request, words)
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    metrics = fit.evaluate(task, checkpoint=checkpoint)
    if is_rank_zero():
        print(json.dumps(strict(metrics)) if as_json else "\n".join(table(metrics)))
    return 0


def table(metrics: Mapping[str, float]) -> list[str]:
    """Names and values below each other."""
    return (
        columns([[name, number(value)] for name, value in metrics.items()], [False, True])
        if metrics
        else []
    )


def strict(value: Any) -> Any:
    """The value as strict JSON has it: "nan", "inf" and "-inf" for what is no JSON number."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return str(value)
    return value
