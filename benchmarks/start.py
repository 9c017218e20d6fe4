"""The time to the first step, as the data set grows and after a long run, and the memory of the order.

    python benchmarks/start.py                         # five minutes

The clock starts where the contestant is called with a model and its data, and stops in the model's
first call. Then the model ends the run by an exception. Each measurement of many samples is a fresh
process, which has trained on few samples before. So imports do not count, and the growth of the peak
memory is that of the order of the samples. The resume is that of ``resumable.py``.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks import by_hand, ours, peers, record, resumable
from benchmarks.job import Job, Model
from benchmarks.overhead import quiet
from benchmarks.throughput import own_peak

CONTESTANTS: dict[str, Callable[[Job], None]] = {
    "by hand": by_hand.best,
    "loopkit": ours.loopkit,
    "lightning": peers.lightning,
    "transformers": peers.transformers,
    "accelerate": peers.accelerate,
}
FEW, BATCH = 10_000, 32
# A list of 10**9 numbers, which torch's sampler makes, does not fit into this memory.
SIZES = {name: (FEW, 10_000_000, *([10**9] if name == "loopkit" else [])) for name in CONTESTANTS}
RESUMED = ("loopkit", "Trainer", "Lightning", "accelerate")
CONSUMED, RESUME_BATCH = 1_000_000, 1_000
PACKAGES = ("torch", "loopkit-torch", "lightning", "transformers", "accelerate")


class Enough(Exception):
    """The model was called, and what follows is not of interest."""


class FirstCall(Model):
    """The model of the job, which ends the run in its first call."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.stamps.append(perf_counter())
        raise Enough


class Samples(Dataset[dict[str, Tensor]]):
    """``count`` samples, which take no memory."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((16,), index / self.count), "labels": torch.tensor(index % 4)}


def first_step(name: str, count: int) -> float:
    """Return the seconds to the first step on ``count`` samples, shuffled."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(1, False, Path(folder))
        job.model = FirstCall()
        job.data = DataLoader(Samples(count), BATCH, shuffle=True)  # type: ignore[assignment]
        began = perf_counter()
        try:
            with quiet():
                CONTESTANTS[name](job)
        except Enough:
            return job.model.stamps[0] - began
    raise RuntimeError(f"{name} did not call the model")


def resumed(name: str, consumed: int, samples: int) -> float:
    """Return the seconds to the first step of a run that is resumed after ``consumed`` samples.

    Raises:
        RuntimeError: the resumed run did not take a step.
    """
    steps = consumed // RESUME_BATCH
    resumable.BATCH, resumable.SAVE_EVERY = RESUME_BATCH, steps
    resumable.SAMPLES, resumable.WIDTH = samples, 16
    with tempfile.TemporaryDirectory() as folder, quiet():
        run = resumable.FRAMEWORKS[name]
        run(resumable.Net(), Path(folder), steps, resume=False)
        net, calls = resumable.Net(), list[float]()
        net.register_forward_pre_hook(lambda *_: calls.append(perf_counter()))
        began = perf_counter()
        run(net, Path(folder), steps + 1, resume=True)
    if not calls:
        raise RuntimeError(f"{name} took no step after its resume")
    return calls[0] - began


def in_a_process(what: str, name: str, count: int) -> tuple[float, float]:
    """Return what a fresh process measured: seconds, and the growth of its peak memory in MB."""
    words = [sys.executable, __file__, f"--{what}", name, "--count", str(count)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {what}: {done.stderr[-1_000:]}")
    seconds, growth = json.loads(done.stdout.splitlines()[-1])
    return seconds, growth


def grown(name: str, count: int) -> tuple[float, float]:
    """Return the seconds to the first step, and the MB that the process takes more than for few."""
    first_step(name, FEW)
    before = own_peak()
    return first_step(name, count), own_peak() - before


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="The time to the first step, side by side.")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each (default: 3)")
    parser.add_argument("--samples", choices=CONTESTANTS, help="measure once, in this process")
    parser.add_argument("--resume", choices=RESUMED, help="measure once, in this process")
    parser.add_argument("--count", type=int, default=FEW, help="samples (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if args.samples:
        print(json.dumps(grown(args.samples, args.count)))
        return
    if args.resume:
        print(json.dumps((resumed(args.resume, args.count, 2 * args.count), 0.0)))
        return
    wanted = [("samples", name, size) for name, sizes in SIZES.items() for size in sizes]
    wanted += [("resume", name, CONSUMED) for name in RESUMED]
    found: dict[tuple[str, str, int], list[tuple[float, float]]] = {each: [] for each in wanted}
    for number in range(args.rounds):
        for each, values in found.items():
            values.append(in_a_process(*each))
        print(f"\rround {number + 1} of {args.rounds}", end="", file=sys.stderr)
    rows: dict[str, list[Any]] = {"samples": [], "resume": []}
    print(f"\n{'':10}{'':14}{'samples':>16}{'s to the first step':>22}{'MB more':>10}")
    for (what, name, size), values in found.items():
        seconds = record.quartiles([second for second, _ in values])
        growth = max(mb for _, mb in values)
        rows[what].append({"name": name, "samples": size, "seconds": seconds, "growth": growth})
        print(f"{what:10}{name:14}{size:16,}{seconds['median']:22.3f}{growth:10.0f}")
    about = {"rounds": args.rounds, "batch": RESUME_BATCH, "versions": record.versions(PACKAGES)}
    record.save("start", {**about, **rows})


if __name__ == "__main__":
    main()
