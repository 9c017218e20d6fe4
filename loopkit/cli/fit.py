"""``loopkit fit``: train a task."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from loopkit.cli.args.request import Command, read_request
from loopkit.console.next_lines import COMMAND_FILE, continue_line
from loopkit.distributed.environment import is_rank_zero
from loopkit.files import write_file
from loopkit.run import Run

INTERRUPTED = 130

FIT = Command(
    "fit",
    "Train a task. Progress goes to stderr, the summary of the result to stdout.",
    {},
    examples=(
        "--epochs 10 --batch-size 64 --precision bf16",
        "--run-dir runs/first --resume auto --checkpoint.best eval/loss:min",
        "--hooks+=EarlyStop --hooks.patience 3",
    ),
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

    def keep_command(run: Run) -> None:
        if run.strategy.rank == 0 and run.run_dir is not None:
            _keep_command(run.run_dir, request.target, argv[1:])

    fit.on("fit_start", keep_command)
    result = fit.run(task)
    interrupted = result.status == "interrupted"
    if is_rank_zero():
        print(result.summary())
        shown = fit.options.progress not in (False, None)  # then the display has said it
        if interrupted and not shown and result.run_dir is not None and result.checkpoint:
            line = continue_line(result.run_dir, result.url)
            print(f"loopkit: interrupted at step {result.step}. {line}", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _keep_command(run_dir: Path, target: str, options: Sequence[str]) -> None:
    """Write what was typed into the run directory, for ``loopkit resume``."""
    command = {"target": target, "options": list(options), "directory": str(Path.cwd())}
    text = json.dumps(command, indent=2) + "\n"
    write_file(run_dir / COMMAND_FILE, [text.encode()])
