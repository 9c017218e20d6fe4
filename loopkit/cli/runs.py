"""``loopkit runs [DIR]``: list the runs in a directory."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from loopkit.cli.args.command_parser import CommandParser
from loopkit.cli.report.run_data import RunData, find_runs, read_run
from loopkit.cli.report.run_table import facts, filtered, run_table, sorted_by
from loopkit.loggers.serialize import jsonable
from loopkit.storage import as_place, outlined


def run(argv: Sequence[str]) -> int:
    """Print a line for each run; return the exit code."""
    parser = CommandParser(
        "runs", "List runs: how each ended, its best value, and the settings that differ."
    )
    parser.add_argument(
        "directory", type=as_place, nargs="?", default=Path("runs"), help="or a URL; default: runs"
    )
    parser.add_argument(
        "--sort",
        metavar="NAME",
        help="a column, an option, an argument of the task or a metric; --sort=-NAME sorts downwards",
    )
    parser.add_argument(
        "--where",
        metavar="CONDITION",
        action="append",
        default=[],
        help="show some runs only: status=killed, 'lr>=1e-3'; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object on each line")
    given = parser.parse_args(argv)
    with outlined(given.directory) as directory:
        _list([read_run(path) for path in find_runs(directory)], given)
    return 0


def _list(found: Sequence[RunData], given: Namespace) -> None:
    runs = filtered(found, given.where)
    if given.sort is not None and runs:
        runs = sorted_by(runs, given.sort)
    if given.json:
        lines = [json.dumps(jsonable(facts(each))) for each in runs]
    elif runs:
        lines = run_table(runs, [each.place for each in runs])
    else:
        lines = [f"no runs in {given.directory}"]
    print(*lines, sep="\n", end="\n" if lines else "")
