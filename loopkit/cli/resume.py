"""``loopkit resume RUN``: continue a run that ``loopkit fit`` started, with the options it had."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopkit.checkpoint.run_dirs import no_run_in
from loopkit.cli import fit
from loopkit.cli.args.tokens import Token, read_tokens
from loopkit.console.next_lines import COMMAND_FILE
from loopkit.distributed.environment import is_rank_zero
from loopkit.errors import OptionError, RunDirError
from loopkit.storage import as_place, open_remote

_LIMIT = 1 << 20
USAGE = """usage: loopkit resume RUN [--option value ...]

Continue a run from its newest valid checkpoint, with the command that
started it. Typed options replace its own:

  loopkit resume runs/digits/3
  loopkit resume runs/digits/3 --epochs 20
"""


def run(argv: Sequence[str]) -> int:
    """Continue a run; return the exit code."""
    if not argv or argv[0] in ("--help", "-h"):
        print(USAGE, end="")
        return 0 if argv else 2
    place, typed = as_place(argv[0]), read_tokens(argv[1:])
    command = _read_command(place)
    taken = {"run_dir", "resume", *(token.name for token in typed if not token.append)}
    kept = [token for token in read_tokens(command["options"]) if token.name not in taken]
    target = _target(command)
    words = [target, *(token.argument for token in (*kept, *typed))]
    words += [Token("run_dir", str(place)).argument, Token("resume", "auto").argument]
    if is_rank_zero():
        print(f"loopkit: fit {' '.join(words)}", file=sys.stderr)
    return fit.run(words)


def _read_command(place: Path | str) -> dict[str, Any]:
    try:
        if isinstance(place, str):
            text = open_remote(place).read(COMMAND_FILE, _LIMIT)
        elif place.is_dir():
            text = (place / COMMAND_FILE).read_bytes()
        else:
            raise RunDirError(f"there is no run directory {place}")
        found: dict[str, Any] = json.loads(text)
    except FileNotFoundError:
        inside = "" if isinstance(place, str) else no_run_in(place)
        raise RunDirError(
            inside
            or f"{place} was not started by loopkit fit: run its program again, with "
            f"Fit(run_dir={str(place)!r}, resume='auto')"
        ) from None
    except ValueError as error:
        raise RunDirError(f"{place}/{COMMAND_FILE} is not JSON: {error}") from error
    return found


def _target(command: dict[str, Any]) -> str:
    """Return the target, seen from here.

    Raises:
        OptionError: it is a file that is not here.
    """
    target = str(command["target"])
    source = target.rpartition(":")[0] or target
    if source.endswith(".py") and not Path(source).is_file():
        raise OptionError(
            f"there is no file {source} here: the run was started in {command['directory']}"
        )
    return target
