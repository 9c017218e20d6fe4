"""Samples per second and peak memory of small real jobs, with their data pipelines, side by side.

    pip install -c constraints.txt -e '.[bench,hf,examples]'
    python benchmarks/throughput.py                      # ten minutes on an idle machine
    python benchmarks/throughput.py --job CNN --rounds 3

Every contestant trains the same model from the same weights, reads every sample once per epoch in
an order of its own, and has a fused AdamW. The contestants take turns in one process with one torch
thread. The clock is in the model: the first epoch's first part warms up, and the rest counts, with
the change of the epoch. Peak memory is that of a fresh process of each contestant.
"""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import record
from benchmarks.overhead import quiet
from benchmarks.real.contestants import CONTESTANTS
from benchmarks.real.jobs import JOBS, RealJob

BASE = "by hand"
WARMUP = 10
PACKAGES = ("torch", "loopkit-torch", "lightning", "transformers", "accelerate", "datasets")


def once(make: Callable[[], RealJob], train: Callable[[RealJob], None], seed: int = 0) -> float:
    """Return the samples per second of one run.

    Args:
        seed: another one gives another order of the samples. Of texts, the order decides how much is padded.

    Raises:
        RuntimeError: the contestant did not read every sample once per epoch.
    """
    job = make()
    job.seed = seed
    torch.manual_seed(seed)
    gc.collect()
    with quiet():
        train(job)
    calls = job.timed.calls
    if sum(count for _, count in calls) != job.samples:
        raise RuntimeError(f"it read {sum(c for _, c in calls)} samples instead of {job.samples}")
    counted = sum(count for _, count in calls[WARMUP:-1])
    return counted / (calls[-1][0] - calls[WARMUP][0])


def measure(name: str, rounds: int) -> dict[str, list[float]]:
    """Return samples per second of each round by contestant. The order of contestants rotates."""
    found: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    for number in range(-1, rounds):  # the first round imports and warms up
        for contestant in record.rotated(found, number):
            try:
                speed = once(JOBS[name], CONTESTANTS[contestant], seed=number + 1)
            except ImportError as error:
                print(f"left out: {contestant}: {error}", file=sys.stderr)
                del found[contestant]
                continue
            if number >= 0:
                found[contestant].append(speed)
        print(f"\r{name}: round {number + 1} of {rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def peak(name: str, contestant: str) -> float:
    """Return the peak memory of a fresh process that trains, in MB."""
    words = [sys.executable, __file__, "--job", name, "--memory", contestant]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def own_peak() -> float:
    """Return the peak memory of this process, without its children, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def summarise(found: dict[str, list[float]], memory: dict[str, float]) -> dict[str, Any]:
    """Return speed, ratio to the loop by hand of the same round, and memory by contestant."""
    rows = record.compared(found, BASE, "speed")
    return {name: {**row, "memory": memory.get(name)} for name, row in rows.items()}


def table(summary: dict[str, Any]) -> str:
    """Return the summary as lines of text, the fastest contestant first."""
    lines = [f"{'':14}{'samples/s':>10}{'ratio':>8}{'peak MB':>10}   quartiles of the ratio"]
    for name, row in sorted(summary.items(), key=lambda item: -item[1]["ratio"]["median"]):
        ratio, memory = row["ratio"], row["memory"]
        shown = f"{memory:10.0f}" if memory else f"{'':10}"
        quartiles = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        lines.append(
            f"{name:14}{row['speed']['median']:10.0f}{ratio['median']:8.3f}{shown}   {quartiles}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Samples per second of real jobs, side by side.")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    parser.add_argument("--job", choices=JOBS, action="append", help="this one alone; no results")
    parser.add_argument("--memory", choices=CONTESTANTS, help="train once, and print the peak, MB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if args.memory:
        once(JOBS[args.job[0]], CONTESTANTS[args.memory])
        print(own_peak())
        return
    jobs = {}
    for name in args.job or JOBS:
        found = measure(name, args.rounds)
        jobs[name] = summarise(found, {other: peak(name, other) for other in found})
        print(f"\n{name}\n{table(jobs[name])}\n", flush=True)
    if args.job is None:
        about = {"rounds": args.rounds, "versions": record.versions(PACKAGES)}
        record.save("throughput", {**about, "jobs": jobs})


if __name__ == "__main__":
    main()
