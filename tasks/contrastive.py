"""Contrastive learning: two cuts of one photo are to look alike, without any labels.

    pip install 'loopkit-torch[examples]'
    python -m tasks.contrastive
    python -m tasks.contrastive --data photos/
    loopkit fit tasks/contrastive.py --strategy ddp --devices 2 --batch-size 64

The encoder learns to find the teacher's vector of the other cut among those of all ranks, and the
reverse, as in Chen et al. (2021). The teacher is a moving average of the encoder.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from loopkit import Fit, Loader, Run, Task, all_gather
from loopkit.errors import LoopkitError
from loopkit.optim import AdamW, OptimizerSpec, cosine
from tasks.image_data import photo_patches, recut, save_grid


class Encoder(nn.Sequential):
    """Makes a vector of length 1 [n, size] from images [n, 3, height, width]."""

    def __init__(self, width: int, size: int) -> None:
        sizes = (3, width, 2 * width, 4 * width)
        layers = [
            (nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU())
            for before, after in pairwise(sizes)
        ]
        super().__init__(
            *(layer for group in layers for layer in group),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * width, size),
        )

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(super().forward(images), dim=-1)


class Contrastive(Task):
    """Learns vectors of photo patches that do not change with cut, mirroring and light.

    Args:
        data: a folder with photos; None for the two that scikit-learn has.
        width: channels of the first layer.
        size: elements of a vector.
        decay: the part of the teacher that stays at each step.
        temperature: divides the similarities.
        lr: peak learning rate.
        workers: processes that load data.
    """

    def __init__(
        self,
        data: str | None = None,
        width: int = 16,
        size: int = 64,
        decay: float = 0.95,
        temperature: float = 0.2,
        lr: float = 3e-3,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.data, self.decay, self.temperature = data, decay, temperature
        self.lr, self.workers = lr, workers
        self.encoder = Encoder(width, size)
        self.teacher = deepcopy(self.encoder).requires_grad_(False)

    def train_step(self, batch: Sequence[Tensor]) -> Tensor:
        one, other = batch
        return (self.loss(one, other) + self.loss(other, one)) / 2

    def loss(self, view: Tensor, other: Tensor) -> Tensor:
        """Return the loss of the encoder's vectors of ``view`` and the teacher's of ``other``."""
        mine, theirs = self.encoder(view), self.teacher(other)
        # The gradient of a step is that of one big batch: other ranks' losses reach these vectors.
        everyone, rows = all_gather(mine)
        targets, _ = all_gather(theirs)
        right = torch.arange(rows.start, rows.stop, device=view.device)
        return (
            F.cross_entropy(mine @ targets.T / self.temperature, right)
            + F.cross_entropy(theirs @ everyone.T / self.temperature, right)
        ) / 2

    @torch.no_grad()
    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Move the teacher towards the encoder."""
        for kept, new in zip(self.teacher.parameters(), self.encoder.parameters()):
            kept.lerp_(new, 1 - self.decay)

    def eval_step(self, batch: Sequence[Tensor]) -> dict[str, Any]:
        view, other = batch
        return {
            "preds": (self.encoder(view), self.encoder(other)),
            "pixels": (view.flatten(1), other.flatten(1)),
        }

    def compute_metrics(self, outputs: Any) -> Mapping[str, float]:
        """Return how often the other cut is the nearest of all, by vectors and by pixels."""
        return {"found": found(*outputs.preds), "pixels/found": found(*outputs.pixels)}

    def optimizers(self) -> OptimizerSpec:
        return AdamW(lr=self.lr, weight_decay=0.01, schedule=cosine(warmup="10%"))

    def train_data(self) -> Loader:
        return Loader(Views(photo_patches(self.data, held_out=False)), num_workers=self.workers)

    def eval_data(self) -> TensorDataset:
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            pairs = list(Views(photo_patches(self.data, held_out=True)))
        return TensorDataset(*(torch.stack(views) for views in zip(*pairs)))


class Views(Dataset[tuple[Tensor, Tensor]]):
    """Two random cuts of each patch, mirrored and lit at random."""

    def __init__(self, patches: Tensor, size: int = 24) -> None:
        self.patches, self.size = patches, size

    def __len__(self) -> int:
        return len(self.patches)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.view(self.patches[index]), self.view(self.patches[index])

    def view(self, patch: Tensor) -> Tensor:
        cut = recut(patch, self.size, smallest=0.6)
        light = 0.6 + 0.8 * torch.rand(3, 1, 1)
        return (cut * light + 0.2 * torch.randn(3, 1, 1)).clamp(0, 1) * 2 - 1


def found(views: Any, others: Any) -> float:
    """Return how often the nearest of ``others`` [n, size] to one of ``views`` is its own."""
    nearest = torch.cdist(torch.as_tensor(views), torch.as_tensor(others)).argmin(1)
    return (nearest == torch.arange(len(nearest))).float().mean().item()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, and search for the other cut of held-out patches."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.contrastive", description="Learn to find patches of photos again."
    )
    parser.add_argument("--data", help="a folder with photos (default: scikit-learn's two)")
    parser.add_argument("--epochs", type=float, default=20, help="passes over the data (20)")
    parser.add_argument("--picture", type=Path, help="a PNG file for what some searches find")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        task = Contrastive(args.data)
        metrics = Fit(epochs=args.epochs, batch_size=64, clip_norm=1.0).run(task).metrics
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    views, others = task.eval_data().tensors
    print(
        f"of {len(views)} cuts it has not seen, the other one is the nearest of all for "
        f"{metrics['eval/found']:.0%}; by pixels for {metrics['eval/pixels/found']:.0%}, "
        f"by chance for {1 / len(views):.0%}"
    )
    if args.picture:
        task.cpu().eval()
        with torch.no_grad():
            nearest = torch.cdist(task.encoder(views), task.encoder(others)).topk(5, largest=False)
        clear = views.std((2, 3)).mean(1).argsort(descending=True)[: 8 * 4 : 4]
        rows = [torch.cat([views[i, None], others[nearest.indices[i]]]) for i in clear]
        save_grid([(row + 1) / 2 for row in rows], args.picture, scale=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
