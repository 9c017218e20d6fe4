"""Tasks and fingerprints that the tests share."""

from __future__ import annotations

import hashlib
import socket
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from loopkit import Fit, Hook, Task
from loopkit.optim import AdamW, cosine


def points(count: int, seed: int = 1) -> TensorDataset:
    """Learnable 8-dimensional points of three classes: x [count, 8] and y [count]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    rule = torch.randn(8, 3, generator=torch.Generator().manual_seed(99))
    return TensorDataset(x, (x @ rule).argmax(1))


class Noisy(Dataset):
    """Points with noise drawn from every global stream at each read, as augmentation does."""

    def __init__(self, count: int) -> None:
        self.points = points(count)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        import random

        import numpy

        x, y = self.points[index]
        return x + 0.1 * torch.randn(8) + 0.1 * random.random() + float(
            0.1 * numpy.random.rand()
        ), y


class Tiny(Task):
    """A small classifier with dropout."""

    def __init__(
        self, count: int = 60, lr: float = 1e-2, dropout: float = 0.2, noisy: bool = False
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.count, self.lr, self.noisy = count, lr, noisy
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def train_step(self, batch: Any) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def eval_step(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, y), "preds": logits, "target": y}

    def predict_step(self, batch: Any) -> torch.Tensor:
        return self.net(batch[0]).argmax(-1)

    def optimizers(self) -> Any:
        return AdamW(lr=self.lr, schedule=cosine(warmup="10%"))

    def train_data(self) -> Any:
        return Noisy(self.count) if self.noisy else points(self.count)

    def eval_data(self) -> Any:
        return points(20, seed=2)


class Recorder(Hook):
    """Keeps the loss of every step as hex, and the ids of nothing else."""

    def __init__(self) -> None:
        self.losses: list[tuple[int, str]] = []

    def on_step_end(self, run: Any, out: Any) -> None:
        self.losses.append((run.progress.step, float(out["loss"]).hex()))


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode())
        sha.update(
            tensors[name]
            .detach()
            .cpu()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
    return sha.hexdigest()


def quiet(**options: Any) -> Fit:
    """A Fit with nothing to see: no console, no loggers; no checkpoints unless asked for."""
    return Fit(**{"progress": False, "loggers": None, "checkpoint": False, **options})


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
