"""Jobs with hooks whose state is another one on each rank."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from loopkit import Checkpoint, Hook
from loopkit.errors import LoopkitWarning
from tests.support import Tiny, quiet

OPTIONS = {"strategy": "ddp", "checkpoint": Checkpoint(every="2 steps", background=False)}


class Walk(Hook):
    """A random walk from a generator that is part of the state: another one on each rank."""

    per_rank_state = True

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(int(os.environ.get("RANK", 0)))
        self.seen: list[float] = []

    def on_step_end(self, run: Any, outputs: Any) -> None:
        self.seen.append(float(torch.rand((), generator=self.generator)))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Any) -> None:
        self.seen = list(state["seen"])
        self.generator.set_state(state["generator"])


class Unsaid(Walk):
    per_rank_state = False


def walk(folder: Path, steps: int, on: tuple[int, ...] = (0, 1), **options: Any) -> list[float]:
    """Train with a walk on the ranks ``on``, stopped after ``steps``; what this rank's walk has seen."""
    hook = Walk()
    hooks = [hook] if int(os.environ["RANK"]) in on else []
    fit = quiet(steps=6, run_dir=folder, hooks=hooks, **OPTIONS, **options)
    fit.on("step_end", lambda run, out: run.stop("cut") if run.progress.step == steps else None)
    fit.run(Tiny())
    return hook.seen


def warnings_of(folder: Path, hook: str) -> list[str]:
    """Train with a hook, by its name; the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", LoopkitWarning)
        hooks = [{"Walk": Walk, "Unsaid": Unsaid}[hook]()]
        quiet(steps=4, run_dir=folder, hooks=hooks, **OPTIONS).run(Tiny())
    return [str(warning.message) for warning in caught]
