"""Writes results: one JSON file for each measurement, and the page that shows them."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Return the median, the lower and the upper quartile."""
    low, _, high = quantiles(values, n=4)
    return {"median": median(values), "low": low, "high": high}


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """Return the contestants in the order of a round: another one begins each time."""
    order = list(names)
    start = max(turn, 0) % len(order)
    return order[start:] + order[:start]


def compared(found: dict[str, list[float]], base: str, what: str) -> dict[str, dict[str, Any]]:
    """Return quartiles of what was measured in each round, alone and against ``base`` of the round.

    Args:
        found: the values of the rounds by contestant.
        base: the contestant that the others are compared with.
        what: the key of the values themselves; "over" and "ratio" are those of the comparison.
    """
    return {
        name: {
            what: quartiles(each),
            "over": quartiles([a - b for a, b in zip(each, found[base])]),
            "ratio": quartiles([a / b for a, b in zip(each, found[base])]),
        }
        for name, each in found.items()
    }


def machine() -> dict[str, Any]:
    """Return the processor, its cores, its load and the Python version."""
    names = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the version of each package that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def results() -> dict[str, Any]:
    """Return the results on disk, by name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(RESULTS.glob("*.json"))}


def save(name: str, result: dict[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json`` with date and machine, and update the page."""
    from benchmarks.page import render

    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    path.write_text(json.dumps({"date": date, "machine": machine(), **result}, indent=2) + "\n")
    PAGE.write_text(render(results()))
    print(f"\nwritten: {path.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}", file=sys.stderr)
    return path
