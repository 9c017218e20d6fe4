"""A script that trains over two ranks, of which one fails in the way that the arguments say.

python -m tests.faults.rank_run RUN_DIR HOW WHERE RANK
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from loopkit import DDP, FSDP, Checkpoint, DeepSpeed
from tests.support import Tiny, digest, points, quiet

WORDS = sys.argv[1:] if __name__ == "__main__" else [".", "", "", "0"]
RUN_DIR, HOW, WHERE, RANK = Path(WORDS[0]), WORDS[1], WORDS[2], int(WORDS[3])
# For runs in which a rank keeps the others waiting. The other runs have a longer one, since a busy
# machine must not hang them.
TIMEOUT = 6.0
ME = int(os.environ.get("RANK", "-1"))


def fail() -> None:
    """Fail once in the life of a run directory, so that a restarted run continues."""
    mark = RUN_DIR / "failed"
    if ME != RANK or mark.exists():
        return
    mark.write_text("")
    if HOW == "raise":
        raise ValueError("bad batch 17")
    if HOW == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if HOW == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if HOW == "hang":
        time.sleep(1000)
    if HOW == "slow":
        time.sleep(TIMEOUT / 2)
    if HOW == "exit":
        sys.exit(3)


class FailingPoints:
    """Points of which the 40th cannot be read."""

    def __init__(self) -> None:
        self.points, self.reads = points(400), 0

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads == 40 and WHERE == "data":
            fail()
        return self.points[index]


class Failing(Tiny):
    """Tiny that fails in its tenth step, or in evaluation."""

    steps = 0

    def train_data(self) -> Any:
        return FailingPoints()

    def train_step(self, batch: Any) -> Any:
        self.steps += 1
        time.sleep(0.01)
        if self.steps == 10 and WHERE == "step":
            fail()
        return super().train_step(batch)

    def eval_step(self, batch: Any) -> Any:
        if WHERE == "eval":
            fail()
        return super().eval_step(batch)


def main() -> None:
    """Train; rank 0 prints how the run ended."""
    under = {"fsdp": FSDP, "deepspeed": DeepSpeed}.get(os.environ.get("UNDER", ""), DDP)
    strategy = under(timeout=TIMEOUT if HOW in ("stop", "hang", "slow") else 90)
    fit = quiet(
        strategy=strategy,
        devices=2,
        epochs=2,
        batch_size=8,
        run_dir=RUN_DIR,
        resume="auto",
        loggers="jsonl",
        checkpoint=Checkpoint(every="4 steps"),
        eval_every="12 steps",
    )

    @fit.on("step_end")
    def tell(run: Any, out: Any) -> None:
        print("step", run.progress.step, flush=True)
        if run.progress.step == 10 and WHERE == "hook":
            fail()

    @fit.on("save")
    def saved(run: Any, path: Path) -> None:
        if WHERE == "save":
            fail()

    task = Failing()
    result = fit.run(task)
    weights = task.state_dict()
    if hasattr(next(iter(weights.values())), "full_tensor"):
        weights = {name: t.full_tensor() for name, t in weights.items()}
    if ME == 0:
        print("end", result.status, result.reason, result.step, digest(weights), flush=True)


if __name__ == "__main__":
    main()
