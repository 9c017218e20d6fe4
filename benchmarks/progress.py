"""Cost of the progress bar for the thread that trains, with the bar drawn on a real terminal.

    python benchmarks/progress.py                      # a minute

Runs with the bar and runs without it take turns. The terminal is a pseudo-terminal that a thread
of another process reads. What is measured is the CPU time of the training thread, per step.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import statistics
import struct
import sys
import tempfile
import termios
import time
from contextlib import redirect_stderr
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from benchmarks.job import Job
from benchmarks.ours import Classifier
from loopkit import Fit


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


def once(progress: str | bool, steps: int) -> float:
    """Return the µs of CPU that the training thread takes per step."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(steps, False, Path(folder))
        fit = Fit(
            loggers=None, checkpoint=False, log_every="50 steps", run_dir=folder, progress=progress
        )
        began = time.thread_time()
        fit.run(Classifier(job))
        return (time.thread_time() - began) / steps * 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The cost of the progress bar per step.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str | bool, list[float]] = {False: [], "rich": []}
    with open(terminal(), "w") as screen, redirect_stderr(screen):
        for number in range(-1, args.rounds):  # the first round imports and warms up
            for progress, all_of_it in found.items():
                taken = once(progress, args.steps if number >= 0 else 500)
                if number >= 0:
                    all_of_it.append(taken)
    extra = [bar - none for bar, none in zip(found["rich"], found[False])]
    print(f"without a bar  {statistics.median(found[False]):8.1f} µs per step")
    print(f"with the bar   {statistics.median(found['rich']):8.1f} µs per step")
    print(f"difference     {statistics.median(extra):+8.1f} µs, of pairs of runs in turns")
    print(f"               {', '.join(f'{each:+.1f}' for each in sorted(extra))}")


if __name__ == "__main__":
    main()
