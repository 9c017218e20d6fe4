"""A script that trains on whatever started it; rank 0 tells its steps and what came of it.

python -m tests.cluster.train RUN_DIR [name=value ...]
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopkit import DDP, FSDP, Checkpoint
from loopkit.distributed.environment import is_rank_zero
from loopkit.loggers.jsonl import read_rows
from loopkit.testing.trace import TIMES
from tests.support import Tiny, digest, quiet

STEPS = 60


class Slow(Tiny):
    """Tiny, whose steps last long enough to be met by what happens to a machine."""

    pause = 0.02

    def train_step(self, batch: Any) -> Any:
        time.sleep(self.pause)
        return super().train_step(batch)


def rows_digest(run_dir: Path) -> str:
    """Return a digest of all rows of the log, without times."""
    rows = [
        {name: value for name, value in row.items() if not re.search(f"{TIMES}|^time$", name)}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def main(run_dir: str, /, *words: str, hooks: Sequence[Any] = (), **options: Any) -> list[str]:
    """Train as the words say; ``hooks`` and ``options`` are for Fit. Return what came of it."""
    given = dict(word.split("=", 1) for word in words)
    under = {"ddp": DDP, "fsdp": FSDP}[given.get("under", "ddp")]
    margin = given.get("job_margin", "auto")
    if "once" in given and "SLURM_RESTART_COUNT" in os.environ:
        margin = "auto"
    fit = quiet(
        strategy=under(accelerator="cpu", timeout=float(given.get("timeout", 120))),
        accelerator="cpu",
        devices=int(given["devices"]) if "devices" in given else "auto",
        nodes=int(given.get("nodes", 1)),
        steps=int(given.get("steps", STEPS)),
        # The same samples make a step on one rank and on two.
        global_batch_size=16,
        batch_size=8,
        run_dir=run_dir,
        resume="auto",
        loggers="jsonl",
        progress="plain" if "progress" in given else False,
        job_margin=False if margin == "False" else margin,
        checkpoint=Checkpoint(
            every="4 steps", keep=None, save_on_each_node=given.get("each_node") == "1"
        ),
        eval_every="20 steps",
        hooks=hooks,
    )
    if options:
        fit = fit.with_options(**options)

    @fit.on("fit_start")
    def began(run: Any) -> None:
        if run.rank == 0:
            print("began", run.progress.step, "of", run.world_size, flush=True)

    @fit.on("step_end")
    def tell(run: Any, out: Any) -> None:
        if run.rank == 0:
            print("step", run.progress.step, flush=True)

    task = Slow(count=400)
    task.pause = float(given.get("pause", Slow.pause))
    result = fit.run(task)
    weights = {
        name: t.full_tensor() if hasattr(t, "full_tensor") else t
        for name, t in task.state_dict().items()
    }
    loss = result.metrics["eval/loss"].hex()
    outcome = [result.status, str(result.step), loss, digest(weights)]
    if is_rank_zero():
        print("end", *outcome, rows_digest(result.run_dir), flush=True)
    return outcome


if __name__ == "__main__":
    main(*sys.argv[1:])
