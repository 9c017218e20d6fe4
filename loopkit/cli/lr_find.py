"""``loopkit lr-find``: find a learning rate in a short test, which the hook FindLR does."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from loopkit.cli.args.parsing import parse
from loopkit.cli.args.request import Command, read_request
from loopkit.cli.args.signature import parameters_of
from loopkit.cli.args.tokens import Text, take_value
from loopkit.distributed.environment import is_rank_zero
from loopkit.hooks.find_lr import FindLR

OPTIONS = {
    "--low RATE": "the first learning rate of the test. [float, default 1e-7]",
    "--high RATE": "the last one. The rate grows by the same factor at each step. "
    "[float, default 1.0]",
    "--points N": "optimizer steps from the first rate to the last. [int, default 100]",
}
LR_FIND = Command(
    "lr-find",
    "Train a few steps with a growing learning rate, and print the rate at which the loss falls "
    "fastest. With --run-dir, the losses are kept there in find_lr.csv.",
    OPTIONS,
    hidden=("resume", "checkpoint", "eval_every", "eval_first", "loggers", "progress", "dry_run"),
    examples=("", "--batch-size 64 --low 1e-5 --high 0.1"),
)


def run(argv: Sequence[str]) -> int:
    """Test the target's learning rates; return the exit code, which is 1 if no rate is found."""
    request = read_request(LR_FIND, argv)
    if request is None:
        return 0
    given: dict[str, Any] = {}
    for option, name in (("low", "low"), ("high", "high"), ("points", "steps")):
        text = take_value(request.tokens, option)
        if text is not None:
            kind = int if name == "steps" else float
            given[name] = parse(kind, Text(text), (option,))
    finder = FindLR(**given)
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    keeps = fit.options.run_dir is not None
    with nullcontext() if keeps else tempfile.TemporaryDirectory(prefix="loopkit-lr-") as folder:
        fit.with_options(
            hooks=[*fit.options.hooks, finder],
            checkpoint=False,
            eval_every="never",
            loggers=None,
            progress=False,
            run_dir=fit.options.run_dir if keeps else folder,
        ).run(task)
    if finder.suggestion is None:
        return 1
    if is_rank_zero():
        print(f"{finder.suggestion:.2g}")
        if "lr" in parameters_of(request.task):
            typed = f"loopkit fit {request.target} --lr {finder.suggestion:.2g}"
            print(f"To use it: {typed}", file=sys.stderr)
    return 0
