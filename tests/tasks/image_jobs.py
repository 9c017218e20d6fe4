"""Runs of the tasks on images, for processes that are killed and for ranks: small, and always alike.

``python -m tests.tasks.image_jobs NAME RUN_DIR STEP`` trains and kills itself at the end of a step.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image
from sklearn.datasets import load_digits

from loopkit import Checkpoint, Task
from loopkit.hooks import Unfreeze
from loopkit.strategies.dtensor import full_tensor
from tests.support import digest, quiet

NAMES = ["contrastive", "diffusion", "distill", "images"]


def made(name: str) -> Task:
    torch.manual_seed(0)
    if name == "contrastive":
        from tasks.contrastive import Contrastive

        return Contrastive(width=16, size=16)
    if name == "diffusion":
        from tasks.diffusion import Diffusion

        return Diffusion(width=16, sampling_steps=4)
    if name == "distill":
        from tasks.distill import Distill

        return Distill(width=4)
    from tasks.images import Images

    return Images(width=16, layers=1)


def train(name: str, run_dir: Any, kill_at: int | None = None) -> str:
    """Train 8 steps, from a checkpoint if there is one; return a hash of the weights."""
    task = made(name)
    fit = quiet(
        steps=8,
        batch_size=8,
        run_dir=run_dir,
        resume="auto",
        checkpoint=Checkpoint(every="3 steps", background=False),
        eval_every="never",
        hooks=[Unfreeze({2: task.body, 5: r".*layernorm"})] if name == "images" else [],
    )
    fit.on(
        "step_end",
        lambda run, out: (
            os.kill(os.getpid(), signal.SIGKILL) if run.progress.step == kill_at else None
        ),
    )
    fit.run(task)
    return digest(task.state_dict())


def train_on_ranks(name: str, strategy: str, **options: Any) -> tuple[dict[str, Any], Any]:
    """Train 4 steps and evaluate; return the metrics and the weights."""
    task = made(name)
    result = quiet(strategy=strategy, steps=4, eval_every=4, clip_norm=1.0, **options).run(task)
    rates = ("eval/runtime", "eval/samples_per_second")
    metrics = {n: v for n, v in result.metrics.items() if n.startswith("eval/") and n not in rates}
    return metrics, {n: full_tensor(value).clone() for n, value in task.state_dict().items()}


def write_digits(folder: Path, digits: Any, count: int) -> str:
    """Write ``count`` images of each digit into a folder by class; return its path."""
    data = load_digits()
    for digit in digits:
        place = folder / f"digit {digit}"
        place.mkdir(parents=True)
        for number, image in enumerate(data.images[data.target == digit][:count]):
            pixels = (image * 255 / 16).round().astype("uint8")
            Image.fromarray(pixels).save(place / f"{number:03}.png")
    return str(folder)


if __name__ == "__main__":
    train(sys.argv[1], sys.argv[2], int(sys.argv[3]))
