"""The training job that every contestant runs, and the clock in the user's code."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LR, CLIP, LOG_EVERY = 1e-3, 1.0, 50


class Model(nn.Module):
    """A tiny classifier that returns its loss and records the time of every call.

    Every framework runs this same code.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        self.stamps: list[float] = []

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.stamps.append(perf_counter())
        return F.cross_entropy(self.net(x), labels)


def batches(count: int) -> list[dict[str, Tensor]]:
    """Return ``count`` prepared batches of 32 samples."""
    generator = torch.Generator().manual_seed(1)
    rule = torch.randn(16, 4, generator=generator)
    xs = torch.randn(count, 32, 16, generator=generator)
    return [{"x": x, "labels": (x @ rule).argmax(1)} for x in xs]


@dataclass
class Job:
    """One run: ``steps`` steps over as many batches, bare or with everything on.

    With everything on, the contestant uses its own means to clip to norm 1, to follow a cosine
    schedule by step, to log every 50 steps to files, to draw a progress bar, and to save a
    checkpoint at the end. ``bar`` alone asks for the progress bar, and ``hooks`` for as many hooks
    of the contestant's own kind, each of which calls ``hook`` after every step.
    """

    steps: int
    full: bool
    folder: Path
    bar: bool = False
    hooks: int = 0
    called: int = field(init=False, default=0)
    model: Model = field(init=False, repr=False)
    data: list[dict[str, Tensor]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Model()
        self.data = batches(self.steps)

    def hook(self) -> None:
        """Count a call."""
        self.called += 1

    def optimizer(self, **options: Any) -> torch.optim.Optimizer:
        """Return AdamW over all parameters in one group. It is fused by default."""
        return torch.optim.AdamW(self.model.parameters(), lr=LR, **({"fused": True} | options))

    def factor(self, step: int) -> float:
        """Return the factor of the learning rate at ``step``, half a cosine over the run."""
        return 0.5 * (1.0 + math.cos(math.pi * step / self.steps))

    def scheduler(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        """Return the cosine as one of torch's schedulers."""
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
