"""``loopkit eject``: write the plain PyTorch script of a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from loopkit.cli.args.request import Command, read_request
from loopkit.cli.args.tokens import take_value
from loopkit.cli.eject.generate import generate
from loopkit.errors import OptionError, RunDirError

EJECT = Command(
    "eject",
    "Write the plain PyTorch script of a run: it needs no loopkit, and gives the same weights.",
    {"--out FILE": "write the script to this file; without it, to stdout"},
    hidden=("resume", "dry_run", "run_dir"),
)


def run(argv: Sequence[str]) -> int:
    """Write the script of the target's run; return the exit code."""
    request = read_request(EJECT, argv)
    if request is None:
        return 0
    out = take_value(request.tokens, "out")
    if out is not None and Path(out).exists():
        raise OptionError(f"--out {out} exists: give another file, or remove it first")
    values = request.values()
    if request.print_config:
        print(values.config, end="")
        return 0
    fit, task = request.build(values)
    command = ["loopkit", "fit", *_without_out(argv)]
    script = generate(task, fit.options, values.task, command, Path(out or "SCRIPT.py").name)
    if out is None:
        print(script, end="")
        return 0
    try:
        Path(out).write_text(script, encoding="utf-8")
    except OSError as error:
        raise RunDirError(f"--out {out} cannot be written: {error.strerror}") from error
    print(f"loopkit: wrote {out}", file=sys.stderr)
    return 0


def _without_out(argv: Sequence[str]) -> list[str]:
    """Return the arguments that ``loopkit fit`` takes as well."""
    found = list(argv)
    for number, word in enumerate(argv):
        if word == "--out":
            del found[number : number + 2]
        elif word.startswith("--out="):
            del found[number]
    return found
