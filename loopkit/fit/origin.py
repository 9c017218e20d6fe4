"""Where a run comes from: its command, its machine, the versions and the commit of its code."""

from __future__ import annotations

import inspect
import platform
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from functools import lru_cache
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


def commit(task: Task) -> dict[str, Any] | None:
    """Return the git commit of a task's code: "id", "branch" and "clean".

    "clean" is False if files that git knows differ from the commit. None without git, outside of a
    repository, and where git takes longer than 5 seconds. Git is asked once in 5 seconds at most.
    """
    return _commit(_source_dir(task), int(time.monotonic() / _PATIENCE))


@lru_cache(maxsize=8)
def _commit(directory: Path, period: int) -> dict[str, Any] | None:
    command = ["git", "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
    try:
        done = subprocess.run(
            [*command, "--untracked-files=no"],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return _read_status(done.stdout)


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
            versions[name] = _version(name)
    versions = {name: version for name, version in versions.items() if version}
    return {
        "command": command_line(),
        "directory": str(Path.cwd()),
        "host": platform.node(),
        "versions": versions,
    }


@lru_cache(maxsize=32)
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


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


@lru_cache(maxsize=8)
def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    with suppress(OSError):  # Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
