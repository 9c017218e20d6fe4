"""Programs of the cluster tests: started with their output in a file, which is read as it grows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = sys.executable
# A guard alone: nothing waits for so long on a machine that works.
GUARD = 600.0


def need(*programs: str) -> None:
    """Skip where this machine lacks root or one of the programs."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces, mounts and daemons")
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, which this machine does not have")


def wait_for(what: Callable[[], Any], name: str, limit: float = GUARD) -> Any:
    """Return what ``what`` returns as soon as it is true."""
    until = time.monotonic() + limit
    while not (found := what()):
        assert time.monotonic() < until, f"{name} never came"
        time.sleep(0.05)
    return found


def environment(**more: str) -> dict[str, str]:
    """Return this environment without the variables of launchers."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
    env = {n: v for n, v in os.environ.items() if n not in foreign and not n.startswith("SLURM_")}
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**env, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **more}


class Program:
    """One program, with all that it and its children print."""

    def __init__(self, words: Sequence[str], log: Path, cwd: Path, **env: str) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                list(words),
                cwd=cwd,
                env=environment(**env),
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def text(self) -> str:
        """Return what was printed so far."""
        return self.log.read_text(errors="replace")

    def until(self, text: str, after: int = 0, times: int = 1) -> int:
        """Wait until ``text`` is printed; return the position behind it.

        Args:
            text: what to wait for.
            after: the position at which the search begins.
            times: how often it must come.
        """
        wait_for(
            lambda: self.text().count(text, after) >= times or self.process.poll() is not None,
            repr(text),
        )
        printed = self.text()
        assert printed.count(text, after) >= times, printed
        return printed.index(text, after) + len(text)

    def end(self, limit: float = GUARD) -> int:
        """Wait for the end; return the exit code."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit} s:\n{self.text()}") from None

    def outcome(self) -> list[str]:
        """Return the words of the line that says what came of the run."""
        assert self.end() == 0, self.text()
        return outcome(self.text())


def outcome(text: str) -> list[str]:
    """Return the words of the line that says what came of a run."""
    lines = [line for line in text.splitlines() if line.startswith("end ")]
    assert len(lines) == 1, text
    return lines[0].split()[1:]


def train(run_dir: Path | str, **given: Any) -> list[str]:
    """Return the command that trains."""
    words = [f"{name}={value}" for name, value in given.items()]
    return [PYTHON, "-u", "-m", "tests.cluster.train", str(run_dir), *words]


def steps_of(run_dir: Path) -> list[str]:
    """Return the names of the checkpoints of a run."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def models(run_dir: Path) -> dict[str, bytes]:
    """Return the files of weights of each checkpoint."""
    found = (run_dir / "checkpoints").glob("step-*/**/model*.safetensors")
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in found}
