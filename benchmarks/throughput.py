"""Samples per second and peak memory of small real jobs, with their data pipelines, side by side.

    pip install -c constraints.txt -e '.[bench,hf,examples]'
    python benchmarks/throughput.py                      # ten minutes on an idle machine
    python benchmarks/throughput.py --job CNN --rounds 3

Every contestant trains the same model from the same weights, reads every sample once per epoch in
an order of its own, and has a fused AdamW. Each contestant has a process of its own with one torch
thread. All train at once and take turns of half a second, so that what else the machine does slows
all of them. The clock is in the model, and stands still between turns: the first epoch's first part
warms up, and the rest counts, with the change of the epoch. Peak memory is that of the first run.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import record
from benchmarks.overhead import quiet
from benchmarks.real.contestants import CONTESTANTS, ENVIRONMENTS
from benchmarks.real.jobs import JOBS, RealJob

BASE = "by hand"
WARMUP = 10
TURN = 0.5  # seconds
# Answers of a contestant's process.
NEXT = "next"  # its turn is over
MISSING = "missing"  # it lacks a package
PACKAGES = ("torch", "loopkit-torch", "lightning", "transformers", "accelerate", "datasets")


class TurnClock:
    """Tells the seconds of this process's turns. At the end of a turn it waits for the next one.

    Args:
        wait: ends this turn, and returns when the next one begins.
    """

    def __init__(self, wait: Callable[[], object]) -> None:
        self._wait = wait
        self._began = perf_counter()
        self._waited = 0.0

    def __call__(self) -> float:
        """Return the seconds so far."""
        now = perf_counter()
        told = now - self._waited
        if now - self._began > TURN:
            self._wait()
            self._began = perf_counter()
            self._waited += self._began - now
        return told


def once(
    make: Callable[[], RealJob],
    train: Callable[[RealJob], None],
    seed: int,
    clock: Callable[[], float],
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

    The first round imports and warms up; it shows the peak.
    """
    found: dict[str, list[float]] = {contestant: [] for contestant in CONTESTANTS}
    peaks: dict[str, float] = {}
    with ExitStack() as ends:
        runners = {}
        for contestant in found:
            words = [sys.executable, __file__, "--job", name, "--contestant", contestant]
            process = answering(words, **ENVIRONMENTS.get(contestant, {}))
            runners[contestant] = ends.enter_context(process)
        for number in range(-1, rounds):
            for contestant, answer in in_turns(runners, record.rotated(found, number), number + 1):
                if answer == MISSING:
                    print(f"left out: {contestant}", file=sys.stderr)
                    del found[contestant]
                    continue
                speed, peak = map(float, answer.split())
                peaks.setdefault(contestant, peak)
                if number >= 0:
                    found[contestant].append(speed)
            print(f"\r{name}: round {number + 1} of {rounds}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found, peaks


@contextmanager
def answering(words: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Inside, a process answers lines; it ends with its input."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, stdin=pipe, stdout=pipe, env={**os.environ, **environment}, text=True
    ) as process:
        assert process.stdin is not None
        try:
            yield process
        finally:
            with suppress(BrokenPipeError):  # it has ended by itself
                process.stdin.close()


def in_turns(
    runners: dict[str, subprocess.Popen[str]], order: Iterable[str], seed: int
) -> list[tuple[str, str]]:
    """Have each contestant of ``order`` train once, one at a time; return their last answers.

    Raises:
        RuntimeError: the process of a contestant has ended.
    """
    answers = dict.fromkeys(order, NEXT)
    while NEXT in answers.values():
        for contestant in [name for name, answer in answers.items() if answer == NEXT]:
            process = runners[contestant]
            assert process.stdin is not None
            assert process.stdout is not None
            with suppress(BrokenPipeError):
                print(seed, file=process.stdin, flush=True)
            answers[contestant] = process.stdout.readline().strip()
            if not answers[contestant]:
                raise RuntimeError(f"{contestant} ended with exit code {process.wait()}")
    return list(answers.items())


def contest(job: str, contestant: str) -> None:
    """Train once for each seed on standard input, and print speed and peak memory.

    During training, each line of input is another turn.
    """
    out = sys.stdout  # contestants may write into another one

    def wait() -> str:
        print(NEXT, file=out, flush=True)
        return sys.stdin.readline()

    for line in iter(sys.stdin.readline, ""):
        try:
            speed = once(JOBS[job], CONTESTANTS[contestant], int(line), TurnClock(wait))
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
