"""Cost of a progress bar that is drawn on a terminal: loopkit, tqdm by hand, the peers.

    python benchmarks/progress.py                      # three minutes

The terminal is a pseudo-terminal that another process reads. A run is long enough to draw the bar
many times. The contestants take turns, and the clock is in the model, as in overhead.py. The bar
shows the loss, which is logged every 50 steps, or as often as the framework does by itself.
"""

from __future__ import annotations

import argparse
import fcntl
import logging
import os
import pty
import struct
import sys
import tempfile
import termios
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks import by_hand, ours, peers, record
from benchmarks.job import Job
from benchmarks.overhead import BASE, PACKAGES, table

BAR = {
    "loopkit": ours.loopkit,
    "tqdm by hand": by_hand.with_tqdm,
    "lightning": peers.lightning,
    "transformers": peers.transformers,
    "accelerate": peers.accelerate,
}
WARMUP = 100


def terminal(columns: int = 100) -> int:
    """Open a pseudo-terminal that another process reads; return the end to write to."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    if os.fork() == 0:
        os.close(follower)
        try:
            while os.read(leader, 1 << 16):
                pass
        except OSError:
            os._exit(0)
    os.close(leader)
    return follower


def once(train: Callable[[Job], None], steps: int, bar: bool, screen: TextIO) -> float:
    """Return the µs per step of one run, with all that happens between two calls of the model."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job = Job(steps, False, Path(folder), bar)
        with redirect_stderr(screen), redirect_stdout(screen):
            train(job)
    stamps = job.model.stamps
    return (stamps[-1] - stamps[WARMUP]) / (len(stamps) - 1 - WARMUP) * 1e6


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="The cost of a progress bar on a terminal.")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4000, help="of a run (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    contestants: dict[str, tuple[Callable[[Job], None], bool]] = {
        BASE: (by_hand.best, False),
        "loopkit without a bar": (ours.loopkit, False),
        **{name: (train, True) for name, train in BAR.items()},
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    with open(terminal(), "w") as screen:
        for number in range(-1, args.rounds):  # the first round imports and warms up
            for name, (train, bar) in contestants.items():
                taken = once(train, args.steps if number >= 0 else 500, bar, screen)
                if number >= 0:
                    found[name].append(taken)
            print(f"\rround {number + 1} of {args.rounds}", end="", file=sys.stderr)
    summary = record.compared(found, BASE, "step")
    print(f"\n{table(summary)}")
    about = {"rounds": args.rounds, "steps": args.steps, "versions": record.versions(PACKAGES)}
    record.save("progress", {**about, "rows": summary})


if __name__ == "__main__":
    main()
