"""``loopkit doctor``: what this machine has, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

from loopkit.cli.args.simple import Arguments
from loopkit.console.text import columns
from loopkit.version import __version__

PACKAGES = ("torch", "numpy", "torchmetrics", "safetensors", "tensorboardX", "rich", "jsonargparse")
LEAST_DISK = 5e9  # bytes; a few checkpoints of a small model


def run(argv: Sequence[str]) -> int:
    """Print the report; the exit code."""
    Arguments(
        "loopkit doctor", "Versions, devices, extras, threads, disk space, compiler."
    ).parse_args(argv)
    rows = [("loopkit", f"{__version__}, {Path(__file__).parent.parent}"), ("python", _python())]
    rows += [(name, _version(name) or "MISSING") for name in PACKAGES]
    rows += [*_devices(), *_threads(), _disk(Path.cwd()), _compiler(), *_extras()]
    print("\n".join(columns([list(row) for row in rows], [False, False])))
    return 0


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[tuple[str, str]]:
    found = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found.append(
            (f"cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {bf16}")
        )
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU"))
    if not found:
        why = "" if torch.version.cuda else ": this torch is built without CUDA"
        found.append(("gpu", f"none{why}"))
    return found


def _threads() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    return [
        (
            "cpu",
            f"{cores} cores, {torch.get_num_threads()} threads for torch"
            + (f" (OMP_NUM_THREADS={limit})" if limit else ""),
        )
    ]


def _disk(folder: Path) -> tuple[str, str]:
    free = shutil.disk_usage(folder).free
    notes = [f"{free / 1e9:,.1f} GB free in {folder}"]
    if free < LEAST_DISK:
        notes.append("LITTLE: checkpoints may not fit")
    if not os.access(folder, os.W_OK):
        notes.append("NOT WRITABLE: give --run-dir")
    return "disk", ", ".join(notes)


def _compiler() -> tuple[str, str]:
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name) or shutil.which("clang++")
    return "compiler", found or f"none: --compile needs {name} for CPU code"


def _extras() -> list[tuple[str, str]]:
    """Each extra of the installed package with what it lacks."""
    wanted: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("loopkit") or []
    except metadata.PackageNotFoundError:
        return [("extras", "unknown: loopkit runs from a folder and is not installed")]
    for line in requirements:
        name, marker = re.match(r"[\w.-]+", line), re.search(r"extra\s*==\s*['\"]([\w-]+)", line)
        if name and marker and name[0] != "loopkit":
            wanted.setdefault(marker[1], []).append(name[0])
    rows = []
    for extra, packages in sorted(wanted.items()):
        lacking = [package for package in packages if _version(package) is None]
        state = (
            f"missing {', '.join(lacking)}: pip install 'loopkit[{extra}]'"
            if lacking
            else "installed"
        )
        rows.append((f"[{extra}]", state))
    return rows
