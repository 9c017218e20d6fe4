"""``loopkit predict``: write a task's predictions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from loopkit.cli.args import saved
from loopkit.cli.args.request import Command, read_request
from loopkit.cli.args.tokens import take_values
from loopkit.cli.predict import open_sink
from loopkit.distributed.environment import is_rank_zero
from loopkit.errors import OptionError

PREDICT = Command(
    "predict",
    "Write a task's predictions, in the order of its data.",
    {
        **saved.ABOUT,
        "--out FILE": "where to: .jsonl (a line for each sample), .npy (one array), .npz (an array by "
        "name) or .txt (a line for each sample). JSON lines on stdout without it",
    },
    hidden=("checkpoint",),
)


def run(argv: Sequence[str]) -> int:
    """Predict with the target; the exit code."""
    request, words = read_request(PREDICT, argv)
    if request is None:
        return 0
    out = take_values(words, "out")
    if len(out) > 1:
        raise OptionError("--out is given several times: predictions go to one file")
    checkpoint = saved.take_checkpoint(request, words)
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    if not is_rank_zero():
        fit.predict(task, checkpoint=checkpoint, writer=lambda outputs: None)
        return 0
    with open_sink(Path(out[0]) if out else None) as sink:
        fit.predict(task, checkpoint=checkpoint, writer=sink.write)
    if out:
        print(f"loopkit: {sink.samples} predictions in {out[0]}", file=sys.stderr)
    return 0
