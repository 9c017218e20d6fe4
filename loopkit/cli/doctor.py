"""``loopkit doctor``: show what this machine has, and what is missing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
from lightning_utilities.core.imports import RequirementCache

from loopkit.cli.args.command_parser import CommandParser
from loopkit.console.text import columns
from loopkit.version import __version__

PACKAGES = ("torch", "numpy", "torchmetrics", "safetensors", "tensorboardX", "rich", "PyYAML")
LEAST_DISK = 5e9  # bytes; a few checkpoints of a small model


def run(argv: Sequence[str]) -> int:
    """Print the report; return the exit code."""
    about = "Show versions, devices, threads, disk space, compiler and installed extras."
    CommandParser("doctor", about).parse_args(argv)
    rows = [
        ("loopkit", f"{__version__}, {Path(__file__).parent.parent}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, _version(name) or "MISSING") for name in PACKAGES),
        *_devices(),
        _threads(),
        _disk(Path.cwd()),
        _compiler(),
        *_extras(),
    ]
    print("\n".join(columns(rows, [False, False])))
    return 0


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
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        found.append((f"cuda:{index}", f"{facts.name}, {memory}, {bf16}"))
    if torch.backends.mps.is_available():
        found.append(("mps", "Apple GPU"))
    if not found:
        reason = "" if torch.version.cuda else ": this torch is built without CUDA"
        found.append(("gpu", f"none{reason}"))
    return found


def _threads() -> tuple[str, str]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = os.environ.get("OMP_NUM_THREADS")
    text = f"{cores} cores, {torch.get_num_threads()} threads for torch"
    return "cpu", f"{text} (OMP_NUM_THREADS={limit})" if limit else text


def _disk(directory: Path) -> tuple[str, str]:
    free = shutil.disk_usage(directory).free
    notes = [f"{free / 1e9:,.1f} GB free in {directory}"]
    if free < LEAST_DISK:
        notes.append("LITTLE: checkpoints may not fit")
    if not os.access(directory, os.W_OK):
        notes.append("NOT WRITABLE: give --run-dir")
    return "disk", ", ".join(notes)


def _compiler() -> tuple[str, str]:
    name = os.environ.get("CXX", "g++")
    found = shutil.which(name) or shutil.which("clang++")
    return "compiler", found or f"none: --compile needs {name} for CPU code"


_TOOLS = ("dev", "docs", "bench")  # extras for work on loopkit itself


def _extras() -> list[tuple[str, str]]:
    """Return a row for each extra of the installed package, with the packages that it lacks."""
    wanted: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("loopkit-torch") or []
    except metadata.PackageNotFoundError:
        return [("extras", "unknown: loopkit runs from a directory and is not installed")]
    for line in requirements:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)", marker)
        if extra and extra[1] not in _TOOLS and not requirement.startswith("loopkit"):
            wanted.setdefault(extra[1], []).append(requirement.strip())
    rows = []
    for name, needed in sorted(wanted.items()):
        lacking = [_shortage(requirement) for requirement in needed if not _is_met(requirement)]
        install = f"pip install 'loopkit-torch[{name}]'"
        state = f"missing {', '.join(lacking)}: {install}" if lacking else "installed"
        rows.append((f"[{name}]", state))
    return rows


def _is_met(requirement: str) -> bool:
    return bool(RequirementCache(requirement))


def _shortage(requirement: str) -> str:
    """Return the package's name; for an installed package, the requirement and its version."""
    name = re.match(r"[\w.-]+", requirement)
    assert name is not None
    version = _version(name[0])
    return f"{requirement} (installed: {version})" if version else name[0]
