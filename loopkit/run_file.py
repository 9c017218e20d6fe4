"""run.json: what a run directory says about its run, and whether the run is still alive."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from loopkit.checkpoint import LOCK
from loopkit.errors import LoopkitError
from loopkit.files import write_file

RUN_FILE = "run.json"
COPY = ".copy-of"
"""A file in a copy of a run directory: nobody can tell there whether the run holds its lock."""
# Where the lock of a run on another machine cannot be seen, a run that wrote nothing for this many
# seconds is taken to be killed.
SILENCE = 600.0


def read_run_file(run_dir: Path, *, held: bool = False) -> dict[str, Any]:
    """Return what run.json says; nothing if there is none.

    ``status`` is "running", "finished", "stopped", "interrupted", "failed" or "killed". A killed
    process cannot write that it was: where the file says "running" and no process holds the
    directory, the status is "killed", and so is that of the last attempt.

    Args:
        run_dir: the run directory.
        held: whether this process itself holds the directory.

    Raises:
        LoopkitError: the file is not JSON.
    """
    path = run_dir / RUN_FILE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LoopkitError(f"{path} is not JSON: {error}") from error
    if not isinstance(about, dict):
        raise LoopkitError(f"{path} holds no JSON object")
    if about.get("status") == "running" and (held or not is_alive(run_dir, about)):
        mark_killed(about, last_sign(run_dir))
    return about


def write_run_file(run_dir: Path, about: Mapping[str, Any]) -> None:
    """Replace run.json in one piece, without a wait for the disk."""
    text = json.dumps(about, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_file(run_dir / RUN_FILE, [text.encode("utf-8", "backslashreplace")])


def is_alive(run_dir: Path, about: Mapping[str, Any]) -> bool:
    """Return whether the process of a run that calls itself running still holds its directory."""
    held = is_held(run_dir)
    if held or (held is False and about.get("host") == platform.node()):
        return bool(held)
    return time.time() - last_sign(run_dir) < SILENCE


def is_held(run_dir: Path) -> bool | None:
    """Return whether a run holds its directory now; None where the file system does not tell."""
    from filelock import lock_descriptor

    if (run_dir / COPY).exists():
        return None
    try:
        handle = os.open(run_dir / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return False
    except OSError:  # no permission to write
        return None
    try:
        return not lock_descriptor(handle, blocking=False)
    except OSError:  # no locks here
        return None
    finally:
        os.close(handle)


def mark_killed(about: dict[str, Any], at: float) -> None:
    """Change the status of a run and of its last attempt to "killed".

    Args:
        about: the content of run.json.
        at: seconds since 1970.
    """
    ended = {"status": "killed", "ended": timestamp(at)}
    about.update(ended)
    for attempt in about.get("attempts", [])[-1:]:
        attempt.update(ended)


def last_sign(run_dir: Path) -> float:
    """Return when a run wrote its log or run.json last, in seconds since 1970; 0 if it never did."""
    found = [0.0]
    for name in (RUN_FILE, "metrics.jsonl"):
        with suppress(OSError):
            found.append((run_dir / name).stat().st_mtime)
    return max(found)


def timestamp(seconds: float) -> str:
    """Return seconds since 1970 as an ISO 8601 time in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
