"""Two ranks as two machines, each with a run directory of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from loopkit import Checkpoint
from loopkit.errors import LoopkitError
from loopkit.events import Hook
from tests.support import Tiny, digest, quiet


@contextmanager
def on_own_machine(disk: Path) -> Iterator[None]:
    """Inside, this rank is the only one of its machine, and relative paths are on its disk."""
    here, before = Path.cwd(), dict(os.environ)
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    disk.mkdir(exist_ok=True)
    os.chdir(disk)
    try:
        yield
    finally:
        os.chdir(here)
        os.environ |= {name: before[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE")}


class FailAt(Hook):
    """Ends all ranks after a step, as a fault on all machines does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, run: Any, out: Any) -> None:
        if run.progress.step == self.step:
            raise LoopkitError("out")


def train(disks: list[str], strategy: str, **options: Any) -> dict[str, Any]:
    """Train on the disk that this rank has; return how it began and ended."""
    began: list[int] = []
    keep, background = options.pop("keep", None), "fail_at" not in options
    hooks = [FailAt(options.pop("fail_at"))] if "fail_at" in options else []
    with on_own_machine(
        Path(disks[dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"])])
    ):
        settings = Checkpoint(
            every="4 steps", keep=keep, save_on_each_node=True, background=background
        )
        fit = quiet(
            **{"strategy": strategy, "accelerator": "cpu", "batch_size": 4, "steps": 14, "run_dir": "runs/a",
               "resume": "auto", "checkpoint": settings, "hooks": hooks, **options},
        )  # fmt: skip
        fit.on("fit_start", lambda run: began.append(run.progress.step))
        task, error = Tiny(count=60), ""
        try:
            fit.run(task)
        except LoopkitError as caught:
            error = str(caught)
        weights = {
            name: t.full_tensor() if hasattr(t, "full_tensor") else t
            for name, t in task.state_dict().items()
        }
        return {"began": began[:1], "error": error, "weights": digest(weights)}
