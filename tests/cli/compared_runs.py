"""Four real runs to compare: two learning rates with two seeds each, one of them killed and resumed."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from loopkit import Checkpoint, Fit, Hook
from tests import fork_server
from tests.support import Tiny


class Shown(Tiny):
    """Tiny with a matrix, whose classes have names, and a name that would be a tag."""

    class_names = ("left", "in the middle", "right")

    def metrics(self) -> Any:
        return {
            "accuracy": MulticlassAccuracy(num_classes=3, average="micro"),
            "confusion": MulticlassConfusionMatrix(num_classes=3),
        }


class KillAt(Hook):
    """Kills this process as ``kill -9`` does, once the checkpoint of an earlier step is there."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, out: Any) -> None:
        run.log({"<b>odd</b>": run.progress.step})
        if run.progress.step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(run_dir: Path, lr: float, seed: int, kill_at: int = -1, epochs: int = 8) -> None:
    """Train one of the runs, in this process."""
    Fit(
        epochs=epochs,
        batch_size=10,
        seed=seed,
        log_every=2,
        clip_norm=1.0,
        run_dir=run_dir,
        resume="auto",
        progress=False,
        loggers="jsonl",
        hooks=[KillAt(kill_at)],
        checkpoint=Checkpoint(best="eval/loss:min", background=False),
    ).run(Shown(lr=lr))


def make(directory: Path) -> list[Path]:
    """Make the four runs; return their directories."""
    made = []
    for lr in (0.002, 0.02):
        for seed in (0, 1):
            made.append(directory / f"lr-{lr}-seed-{seed}")
            if (lr, seed) == (0.02, 1):
                kill(made[-1], lr, seed)
            train(made[-1], lr, seed)
    return made


def kill(run_dir: Path, lr: float, seed: int) -> None:
    """Train until the process is killed, after a checkpoint."""
    code = (
        "from pathlib import Path; from tests.cli.compared_runs import train; "
        f"train(Path({str(run_dir)!r}), {lr}, {seed}, kill_at=21)"
    )
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = fork_server.run([sys.executable, "-c", code], cwd=root, env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
