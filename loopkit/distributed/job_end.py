"""When the SLURM job of this process ends, as SLURM tells it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping

from loopkit.errors import LoopkitError

_PATIENCE = 20.0  # seconds
_NO_LIMIT = ("UNLIMITED", "NOT_SET")


def find_job_end(env: Mapping[str, str] = os.environ, *, ask: bool = False) -> float | None:
    """Return when the SLURM job of this process ends, in seconds since 1970.

    Args:
        env: the environment, where newer versions of SLURM write the time.
        ask: ask SLURM in any case, as the limit of a job may be changed while it runs.

    Returns:
        None if this process belongs to no SLURM job, or to one without a time limit.

    Raises:
        LoopkitError: SLURM did not tell.
    """
    job = env.get("SLURM_JOB_ID")
    if job is None:
        return None
    known = env.get("SLURM_JOB_END_TIME", "")
    if known.isdigit() and not ask:
        return float(known)
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%L"]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_PATIENCE, check=True
        ).stdout.strip()
        left = None if answer in _NO_LIMIT else seconds_of(answer)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise LoopkitError(f"SLURM does not tell when job {job} ends: {error}") from error
    return None if left is None else time.time() + left


def seconds_of(text: str) -> int:
    """Return the seconds of a length of time as SLURM writes it: "1-02:03:04", "2:03:04", "03:04".

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        raise ValueError(f"{text!r} is no length of time")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
