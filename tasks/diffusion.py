"""Diffusion: a network learns to remove noise, and so makes images of the class that is asked for.

    pip install 'loopkit-torch[examples]'
    python -m tasks.diffusion
    python -m tasks.diffusion --data images/ --size 16
    loopkit fit tasks/diffusion.py --epochs 100 --hooks+='EMA(0.999)'

The noise is added as in Ho et al. (2020), by the cosine schedule of Nichol and Dhariwal (2021). It is
removed without new noise, as in Song et al. (2021): an image is a function of its first noise.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from loopkit import Fit, Task
from loopkit.errors import LoopkitError, OptionError
from loopkit.hooks import EMA
from loopkit.optim import AdamW, cosine
from tasks.image_data import class_names, labelled_images, save_grid


class Block(nn.Module):
    """Two convolutions around the time and the class, with a residual connection."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.GroupNorm(1, inputs), nn.GroupNorm(8, width)
        self.conv_in = nn.Conv2d(inputs, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        self.about = nn.Linear(width, width)
        self.skip = nn.Conv2d(inputs, width, 1)

    def forward(self, x: Tensor, about: Tensor) -> Tensor:
        hidden = self.conv_in(F.silu(self.norm_in(x))) + self.about(about)[:, :, None, None]
        return self.skip(x) + self.conv_out(F.silu(self.norm_out(hidden)))


class UNet(nn.Module):
    """Predicts the noise in images [n, channels, height, width] of even height and width."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.classes = nn.Embedding(classes, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.middle = Block(width, width), Block(width, width)
        self.bottom, self.up = Block(width, width), Block(2 * width, width)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, noisy: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        rates = torch.exp(torch.linspace(0, 6, self.width // 2, device=time.device))
        angles = time[:, None] * rates
        about = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.classes(labels))
        wide = self.down(self.first(noisy), about)
        small = self.bottom(self.middle(F.avg_pool2d(wide, 2), about), about)
        large = F.interpolate(small, scale_factor=2.0)
        return self.last(F.silu(self.up(torch.cat([wide, large], 1), about)))


class Diffusion(Task):
    """Makes images of a class from noise.

    Args:
        data: a folder of images by class; None for scikit-learn's digits.
        size: height and width that the images of a folder get; even.
        width: channels of the hidden layers; a multiple of 8.
        lr: peak learning rate.
        sampling_steps: steps in which noise is removed when an image is made.
    """

    def __init__(
        self,
        data: str | None = None,
        size: int = 16,
        width: int = 32,
        lr: float = 2e-3,
        sampling_steps: int = 20,
    ) -> None:
        super().__init__()
        if size % 2 or width % 8:
            raise OptionError(
                f"Diffusion(size={size}, width={width}): the size must be even, as the network halves "
                "it, and the width a multiple of 8"
            )
        self.data, self.size, self.lr = data, size, lr
        self.sampling_steps = sampling_steps
        self.channels = 1 if data is None else 3
        self.net = UNet(self.channels, len(class_names(data)), width)

    def train_step(self, batch: Sequence[Tensor]) -> Tensor:
        images, labels = batch
        time = torch.rand(len(images), device=images.device)
        return self.loss(images, labels, time, torch.randn_like(images))

    def loss(self, images: Tensor, labels: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """Return the mean squared error of the noise that is predicted at ``time``, from 0 to 1."""
        signal, sigma = (part[:, None, None, None] for part in levels(time))
        return F.mse_loss(self.net(signal * images + sigma * noise, time, labels), noise)

    def eval_step(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        images, labels, time, noise = batch
        return {
            "loss": self.loss(images, labels, time, noise),
            "preds": self.make(labels, noise),
            "target": labels,
        }

    @torch.no_grad()
    def make(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Return images of classes ``labels`` [n], made from ``noise`` [n, channels, height, width]."""
        image = noise
        for step in range(self.sampling_steps, 0, -1):
            now, then = (
                torch.full((len(noise),), at / self.sampling_steps, device=noise.device)
                for at in (step, step - 1)
            )
            signal, sigma = (part[:, None, None, None] for part in levels(now))
            found = self.net(image, now, labels)
            clean = ((image - sigma * found) / signal).clamp(-1, 1)
            found = (image - signal * clean) / sigma
            signal, sigma = (part[:, None, None, None] for part in levels(then))
            image = signal * clean + sigma * found
        return image

    def compute_metrics(self, outputs: Any) -> Mapping[str, float]:
        """Return what part of the made images is next to a real one of the class asked for.

        ``distance`` is the mean distance to the nearest real image. That of held-out real images is
        ``real/distance``.
        """
        real = self.train_data()
        known, held = real.tensors[0].flatten(1), self.eval_data().tensors[0].flatten(1)
        made = torch.as_tensor(outputs.preds).flatten(1)
        distance, nearest = torch.cdist(made, known).min(1)
        right = real.tensors[1][nearest] == torch.as_tensor(outputs.target)
        return {
            "accuracy": right.float().mean().item(),
            "distance": distance.mean().item(),
            "real/distance": torch.cdist(held, known).min(1).values.mean().item(),
        }

    def optimizers(self) -> Any:
        return AdamW(lr=self.lr, schedule=cosine(warmup="5%"))

    def train_data(self) -> TensorDataset:
        return self._images(held_out=False)

    def eval_data(self) -> TensorDataset:
        images, labels = self._images(held_out=True).tensors
        generator = torch.Generator().manual_seed(0)
        time = (torch.arange(len(images)) + 0.5) / len(images)
        return TensorDataset(images, labels, time, torch.randn(images.shape, generator=generator))

    def _images(self, *, held_out: bool) -> TensorDataset:
        found = labelled_images(
            self.data, held_out=held_out, size=self.size, channels=self.channels
        )
        images, labels = found.stacked()
        return TensorDataset(images * 2 - 1, labels)


def levels(time: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of image and noise at times [n] from 0 to 1: a quarter of a circle."""
    angle = (0.008 + 0.984 * time) * math.pi / 2
    return angle.cos(), angle.sin()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, measure the made images beside noise, and draw some of each class."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.diffusion", description="Learn to make images from noise."
    )
    parser.add_argument("--data", help="a folder of images by class (default: digits)")
    parser.add_argument("--size", type=int, default=16, help="height of a folder's images (16)")
    parser.add_argument("--epochs", type=float, default=60, help="passes over the data (60)")
    parser.add_argument("--picture", type=Path, help="a PNG file for images of each class")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        task = Diffusion(args.data, args.size)
        fit = Fit(
            epochs=args.epochs,
            batch_size=64,
            eval_every="20 epochs",
            clip_norm=1.0,
            hooks=[EMA(0.99, apply_at_end=True)],
        )
        before = fit.evaluate(task)
        after = fit.run(task).metrics
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name, found in (("before", before), ("after", after)):
        print(
            f"{name}: loss {found['eval/loss']:.3f}; {found['eval/accuracy']:.0%} of the made images "
            f"are nearest to one of their class, at a distance of {found['eval/distance']:.2f}"
        )
    print(f"held-out images are at a distance of {after['eval/real/distance']:.2f}")
    if args.picture:
        classes = torch.arange(task.net.classes.num_embeddings)
        _, _, _, noise = task.eval_data()[: 8 * len(classes)]
        made = task.eval().make(classes.repeat(8), noise)
        save_grid((made.cpu().unflatten(0, (8, -1)) + 1) / 2, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
