"""A run that tells its steps on stdout, for tests that interrupt it: python -m
tests.faults.slow_run DIR [BLOCK].
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from loopkit import Checkpoint, Loader
from tests.support import Noisy, Tiny, digest, quiet


class Blocking(Noisy):
    """Noisy points; the first attempt waits for ever at its 35th read."""

    def __init__(self, marker: Path | None) -> None:
        super().__init__(60)
        self.marker, self.reads = marker, 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == 35 and self.marker is not None and not self.marker.exists():
            self.marker.touch()
            print("blocked", flush=True)
            time.sleep(3600)
        return super().__getitem__(index)


class Slow(Tiny):
    """Tiny whose steps take 20 ms."""

    def __init__(self, marker: Path | None = None) -> None:
        super().__init__(noisy=True)
        self.marker = marker

    def train_data(self):
        return Loader(Blocking(self.marker))

    def train_step(self, batch):
        time.sleep(0.02)
        return super().train_step(batch)


def main(run_dir: str, block: str = "") -> None:
    """Run or resume to step 60, and print the digest of the weights."""
    torch.set_num_threads(1)
    task = Slow(Path(run_dir) / "marker" if block else None)
    fit = quiet(
        epochs=10,
        batch_size=10,
        run_dir=run_dir,
        resume="auto",
        checkpoint=Checkpoint(every="4 steps"),
        loggers="jsonl",
        eval_every="5 steps",
    )
    fit.on("step_end", lambda run, out: print("step", run.progress.step, flush=True))
    fit.on("save", lambda run, path: print("saved", path.name, flush=True))
    result = fit.run(task)
    print("end", result.status, result.reason, result.step, digest(task.state_dict()), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
