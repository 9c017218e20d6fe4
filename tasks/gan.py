"""A GAN on eight points of a ring: two players, two optimizers, one custom step.

    python -m tasks.gan

``GanStep`` is the custom step. Accumulation, clipping, precision, checkpoints and exact resume work
without further code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from loopkit import Fit, Run, StepLoop, Task
from loopkit.optim import Adam, OptimizerSpec, cosine

POINTS = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])
# Standard deviation of the points around each of the eight.
SPREAD = 0.05


class GanStep(StepLoop):
    """Trains the critic to recognise made points, then the generator to make points that look real."""

    def run(self, run: Run, batches: Any) -> Mapping[str, Any]:
        """Update each player once, on the same micro-batches."""
        losses = {}
        for player in ("critic", "generator"):
            losses[player] = self.backward(
                run, batches, method=f"{player}_step", optimizers=[player]
            )["loss"]
            self.update(run, optimizers=[player])
        return losses


class RingGan(Task):
    """Learns to make points that are normally distributed around each of eight points.

    The losses are those of Goodfellow et al. (2014), with the non-saturating generator loss.

    Args:
        hidden: units of the hidden layers.
        noise: dimensions of the noise from which the generator makes points.
        lr: peak learning rate of both players.
    """

    def __init__(self, hidden: int = 64, noise: int = 8, lr: float = 3e-3) -> None:
        super().__init__()
        self.noise, self.lr = noise, lr
        self.generator = nn.Sequential(
            nn.Linear(noise, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, 2),
        )
        self.critic = nn.Sequential(
            nn.Linear(2, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1),
        )

    def loops(self) -> Mapping[str, StepLoop]:
        return {"step": GanStep()}

    def make(self, count: int) -> Tensor:
        """Return ``count`` new points (count, 2)."""
        return self.generator(torch.randn(count, self.noise, device=next(self.parameters()).device))

    def critic_step(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the loss of the critic. Its logits above 0 mean "real"."""
        (real,) = batch
        made = self.make(len(real)).detach()
        return F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(made)).mean()

    def generator_step(self, batch: Sequence[Tensor]) -> Tensor:
        """Return the loss of the generator. It is high if the critic recognises made points."""
        return F.softplus(-self.critic(self.make(len(batch[0])))).mean()

    def eval_step(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"loss": self.generator_step(batch), "preds": self.make(len(batch[0]))}

    def compute_metrics(self, outputs: Any) -> dict[str, float]:
        """Return how many of the eight points are reached, and the fraction of points near one."""
        distance, nearest = torch.cdist(torch.as_tensor(outputs.preds), POINTS).min(-1)
        near = distance < 3 * SPREAD
        return {"points": len(set(nearest[near].tolist())), "near": near.float().mean().item()}

    def optimizers(self) -> dict[str, OptimizerSpec]:
        return {
            player: Adam(lr=self.lr, betas=(0.5, 0.99), schedule=cosine(), params=f"^{player}")
            for player in ("critic", "generator")
        }

    def train_data(self) -> TensorDataset:
        return _ring(51_200, seed=1)

    def eval_data(self) -> TensorDataset:
        return _ring(1_000, seed=2)


def _ring(count: int, seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(8, (count,), generator=generator)
    return TensorDataset(POINTS[which] + SPREAD * torch.randn(count, 2, generator=generator))


def main() -> None:
    """Train, and draw the made points as text."""
    task = RingGan()
    result = Fit(epochs=6, batch_size=128).run(task)
    points, near = result.metrics["eval/points"], result.metrics["eval/near"]
    print(f"{points:.0f} of 8 points reached; {near:.0%} of what it makes lies near one:")
    with torch.no_grad():
        columns, rows = (
            ((task.make(500).cpu().clamp(-1.2, 1.2) + 1.2) / 2.4 * torch.tensor([48, 20]))
            .round()
            .int()
            .T
        )
    canvas = [[" "] * 49 for _ in range(21)]
    for column, row in zip(columns.tolist(), rows.tolist()):
        canvas[20 - row][column] = "*"
    print("\n".join("".join(line).rstrip() for line in canvas))
    print("files:", result.run_dir)


if __name__ == "__main__":
    main()
