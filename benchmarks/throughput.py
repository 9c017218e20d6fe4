"""Samples per second and peak memory of small real jobs, with their data pipelines, side by side.

    pip install -c constraints.txt -e '.[bench,hf,examples]'
    python benchmarks/throughput.py                      # half an hour on an idle machine
    python benchmarks/throughput.py --job CNN --rounds 3

Every contestant trains the same model from the same weights, reads every sample once per epoch in
an order of its own, and has a fused AdamW. Each contestant has a process of its own with one torch
thread, a new one in each round. All train at once and take turns of some steps, so that what else
the machine does slows all of them. The clock is in the model, and stands still between turns: the
first epoch's first part warms up, and the rest counts, with the change of the epoch. Peak memory is
that of the first run.
"""

from __future__ import annotations

import argparse
import gc
import logging
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
from benchmarks.turns import MISSING, TurnClock, rounds_of, wait_for_turn

BASE = "by hand"
WARMUP = 10  # steps
# Seconds. Worker processes read ahead while others train; in a turn of few steps nothing else is read.
WORKERS_TURN = 0.25
PACKAGES = ("torch", "loopkit-torch", "lightning", "transformers", "accelerate", "datasets")


def once(
    make: Callable[[], RealJob],
    train: Callable[[RealJob], None],
    seed: int,
    clock: TurnClock,
) -> float:
    """Return the samples per second of one run.

    Args:
        seed: another one gives another order of the samples. Of texts, the order decides how much is padded.
        clock: tells the time, when the model is called.

    Raises:
        RuntimeError: the contestant did not read every sample once per epoch.
    """
    job = make()
    job.seed = seed
    job.timed.clock = clock
    if job.num_workers:
        clock.seconds = WORKERS_TURN
    torch.manual_seed(seed)
    gc.collect()
    with quiet():
        train(job)
    calls = job.timed.calls
    if sum(count for _, count in calls) != job.samples:
        raise RuntimeError(f"it read {sum(c for _, c in calls)} samples instead of {job.samples}")
    counted = sum(count for _, count in calls[WARMUP:-1])
    return counted / (calls[-1][0] - calls[WARMUP][0])


def measure(name: str, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return samples per second of each round, and peak memory in MB, by contestant.

    The peak is that of the first round.
    """
    found: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    words = [sys.executable, __file__, "--job", name, "--contestant"]
    commands = {contestant: [*words, contestant] for contestant in CONTESTANTS}
    for contestant, answer in rounds_of(name, commands, rounds):
        speed, peak = map(float, answer.split())
        peaks.setdefault(contestant, peak)
        found.setdefault(contestant, []).append(speed)
    return found, peaks


def contest(job: str, contestant: str) -> None:
    """Train once for each seed on standard input, and print speed and peak memory.

    During training, each line of input is another turn.
    """
    for line in iter(sys.stdin.readline, ""):
        try:
            clock = TurnClock(wait_for_turn)
            speed = once(JOBS[job], CONTESTANTS[contestant], int(line), clock)
            print(speed, own_peak(), flush=True)
        except ImportError as error:
            print(error, file=sys.stderr)
            print(MISSING, flush=True)


def own_peak() -> float:
    """Return the peak memory of this process, without its children, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def summarise(found: dict[str, list[float]], memory: dict[str, float]) -> dict[str, Any]:
    """Return speed, ratio to the loop by hand of the same round, and memory by contestant."""
    rows = record.compared(found, BASE, "speed")
    return {
        name: {
            **row,
            "memory": memory.get(name),
            "rounds": [round(speed, 1) for speed in found[name]],
        }
        for name, row in rows.items()
    }


def table(summary: dict[str, Any]) -> str:
    """Return the summary as lines of text, the fastest contestant first."""
    lines = [f"{'':22}{'samples/s':>10}{'ratio':>8}{'peak MB':>10}   quartiles of the ratio"]
    for name, row in sorted(summary.items(), key=lambda item: -item[1]["ratio"]["median"]):
        ratio, memory = row["ratio"], row["memory"]
        shown = f"{memory:10.0f}" if memory else f"{'':10}"
        quartiles = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
        lines.append(
            f"{name:22}{row['speed']['median']:10.0f}{ratio['median']:8.3f}{shown}   {quartiles}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Samples per second of real jobs, side by side.")
    parser.add_argument(
        "--rounds", type=int, default=10, help="runs of each (default: %(default)s)"
    )
    parser.add_argument("--job", choices=JOBS, action="append", help="this one alone; no results")
    parser.add_argument(
        "--contestant", choices=CONTESTANTS, help="train once for each line of input"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if args.contestant:
        contest(args.job[0], args.contestant)
        return
    jobs = {}
    for name in args.job or JOBS:
        jobs[name] = summarise(*measure(name, args.rounds))
        print(f"\n{name}\n{table(jobs[name])}\n", flush=True)
    if args.job is None:
        about = {"rounds": args.rounds, "versions": record.versions(PACKAGES)}
        record.save("throughput", {**about, "jobs": jobs})


if __name__ == "__main__":
    main()
