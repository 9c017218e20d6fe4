"""``loopkit report RUN …``: show what runs did, from their files."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from loopkit.cli.args.command_parser import CommandParser
from loopkit.cli.report.html_page import html_page
from loopkit.cli.report.payload import payload
from loopkit.cli.report.run_data import RunData, find_runs, read_run
from loopkit.cli.report.serve import PageServer, files_state
from loopkit.cli.report.text_report import MOST_EVALUATIONS, comparison, report
from loopkit.errors import LoopkitError, OptionError, RunDirError
from loopkit.files import write_file
from loopkit.run_file import read_run_file
from loopkit.storage import as_place, outlined


def run(argv: Sequence[str]) -> int:
    """Print or write the report of runs; return the exit code."""
    parser = CommandParser(
        "report",
        "Show what runs did: their settings, curves, evaluations and checkpoints. Several runs are "
        "compared. A directory of runs stands for all of them.",
    )
    parser.add_argument(
        "runs", type=as_place, nargs="+", metavar="RUN", help="a run directory, or a URL of one"
    )
    parser.add_argument(
        "--all", action="store_true", help=f"show more than {MOST_EVALUATIONS} evaluations"
    )
    parser.add_argument("--json", action="store_true", help="print all values as JSON")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page, in one file")
    parser.add_argument(
        "--watch", action="store_true", help="serve the page on this machine while runs train"
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port for --watch; 0 takes a free one, default: 0"
    )
    given = parser.parse_args(argv)
    if sum((given.json, given.html is not None, given.watch)) > 1:
        raise OptionError("report: give one of --json, --html and --watch")
    if given.watch:
        for place in given.runs:
            if isinstance(place, str):
                raise OptionError(
                    f"report --watch follows the files of this machine, and {place} is a URL: leave "
                    "--watch out, or name the local copy of the run"
                )
        read_runs(given.runs)
        return _watch(given.runs, given.port)
    with ExitStack() as copies:
        _show([copies.enter_context(outlined(place)) for place in given.runs], given)
    return 0


def _show(paths: Sequence[Path], given: Namespace) -> None:
    runs = read_runs(paths)
    if given.html is not None:
        _write(given.html, html_page(payload(runs)))
    elif given.json:
        print(json.dumps(payload(runs), ensure_ascii=False))
    elif len(runs) == 1:
        print(report(runs[0].path, everything=given.all))
    else:
        print(comparison(runs))


def read_runs(paths: Sequence[Path]) -> list[RunData]:
    """Read run directories, and all below a directory that is none.

    Raises:
        LoopkitError: there is no such directory, or no run in it.
    """
    found: dict[Path, None] = {}
    for path in paths:
        inside = find_runs(path)
        if not inside:
            raise LoopkitError(f"{path} holds no run, nor does a directory below it")
        found |= dict.fromkeys(inside)
    return [read_run(path) for path in found]


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, [text.encode("utf-8", "backslashreplace")])
    except OSError as error:
        raise RunDirError(f"--html {path} cannot be written: {error.strerror}") from error
    print(f"loopkit: wrote {path}, {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def _watch(paths: Sequence[Path], port: int) -> int:
    def state() -> str:
        found = [path for each in paths for path in find_runs(each)]
        return files_state(found, [str(read_run_file(each).get("status")) for each in found])

    with PageServer(lambda: payload(read_runs(paths), live=True), state, port) as server:
        print(f"loopkit: watching at {server.url} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0
