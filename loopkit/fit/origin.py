"""Where a run comes from: its command, its machine, the versions and the commit of its code."""

from __future__ import annotations

import inspect
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from loopkit.run import Run
from loopkit.task import Task
from loopkit.version import __version__

_PACKAGES = (
    "numpy", "torchmetrics", "transformers", "datasets", "peft", "lightning", "torchvision", "deepspeed",
)  # fmt: skip
_PATIENCE = 5.0  # seconds for git


class Commit:
    """The git commit of a task's code. Git runs beside the set-up of the run.

    Without git, or outside of a repository, nothing is known.
    """

    def __init__(self, task: Task) -> None:
        self._git: subprocess.Popen[str] | None = None
        self._found: dict[str, Any] | None = None
        command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
        with suppress(OSError):
            self._git = subprocess.Popen(
                [*command, "--untracked-files=no"],
                cwd=_source_dir(task),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                errors="replace",
            )

    def found(self) -> dict[str, Any] | None:
        """Return "id", "branch" and "clean", which is False if tracked files differ from the commit."""
        if self._git is not None:
            git, self._git = self._git, None
            try:
                text, _ = git.communicate(timeout=_PATIENCE)
                self._found = _read_status(text)
            except subprocess.TimeoutExpired:
                git.kill()
                git.communicate()
        return self._found


def _read_status(text: str) -> dict[str, Any] | None:
    lines = text.splitlines()
    heads = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch."))
    if "branch.oid" not in heads:
        return None
    return {
        "id": heads["branch.oid"],
        "branch": heads.get("branch.head"),
        "clean": all(line.startswith("#") for line in lines),
    }


def _source_dir(task: Task) -> Path:
    """Return the directory of the file that defines a task; the current one if no file does."""
    with suppress(OSError, TypeError):
        file = inspect.getsourcefile(type(task))
        if file is not None and Path(file).is_file():
            return Path(file).resolve().parent
    return Path.cwd()


def command_line() -> str | None:
    """Return the command of this process as it is typed; None in a notebook."""
    if "ipykernel" in sys.modules:
        return None
    words = list(sys.orig_argv)
    if words[1:3] == ["-m", "loopkit"]:
        words = ["loopkit", *words[3:]]
    elif len(words) > 1 and Path(words[1]).name == "loopkit":
        words = ["loopkit", *words[2:]]
    elif words:
        words[0] = Path(words[0]).name
    return shlex.join(words)


def environment() -> dict[str, Any]:
    """Return the command, the folder, the host and the versions of this process."""
    versions = {
        "loopkit": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    for name in _PACKAGES:
        if name in sys.modules:
            with suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
    return {
        "command": command_line(),
        "directory": str(Path.cwd()),
        "host": platform.node(),
        "versions": versions,
    }


def hardware(run: Run) -> dict[str, Any]:
    """Return the device of rank 0, the number of ranks, the strategy and the precision."""
    strategy = run.strategy
    return {
        "devices": {
            "device": str(strategy.device),
            "name": _device_name(strategy.device),
            "ranks": strategy.world_size,
            "threads": torch.get_num_threads(),
        },
        "strategy": strategy.name,
        "precision": strategy.settings.precision.name,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with suppress(OSError):  # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
