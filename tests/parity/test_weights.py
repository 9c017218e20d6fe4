"""With weights, the gradient of ragged micro-batches is that of one big batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from loopkit import Task
from tests.support import quiet

SIZES = (5, 1, 8, 3)


class Ragged(Task):
    """Sequences of 6 tokens with labels ignored at random; one step over four ragged micro-batches."""

    def __init__(self, kind: str, whole: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.whole = kind, whole
        self.net = torch.nn.Sequential(
            torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)
        )
        self.grads: dict[str, torch.Tensor] = {}

    def loss(self, x, y, target):
        out = self.net(x)
        cross = F.cross_entropy(out.flatten(0, 1), y.flatten(), ignore_index=-100)
        kept = y != -100
        squared = F.mse_loss(out[kept], target[kept])
        return {"cross": cross, "mse": squared, "both": cross + 0.3 * squared}[
            self.kind
        ], kept.sum()

    def train_step(self, batch):
        loss, weight = self.loss(*batch)
        return {"loss": loss, "weight": weight}

    def optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_data(self):
        generator = torch.Generator().manual_seed(3)
        batches = []
        for size in SIZES:
            x = torch.randn(size, 6, 4, generator=generator, dtype=torch.float64)
            y = torch.randint(0, 5, (size, 6), generator=generator)
            y[torch.rand(size, 6, generator=generator) < 0.4] = -100
            batches.append(
                (x, y, torch.randn(size, 6, 5, generator=generator, dtype=torch.float64))
            )
        batches[1][1][:] = -100  # nothing to learn from in the second micro-batch
        return [tuple(map(torch.cat, zip(*batches)))] if self.whole else batches

    def on_before_update(self, run, grad_norm):
        self.grads = {name: p.grad.clone() for name, p in self.named_parameters()}


@pytest.mark.parametrize("kind", ["cross", "mse", "both"])
def test_weighted_gradient_of_ragged_micro_batches_is_the_big_batchs_to_1e10(kind):
    whole, parts = Ragged(kind, whole=True), Ragged(kind, whole=False)
    one = quiet(precision="fp64").run(whole)
    many = quiet(precision="fp64", accumulate=len(SIZES)).run(parts)
    assert one.step == many.step == 1
    assert max(float(g.abs().max()) for g in whole.grads.values()) > 1e-3
    for name, grad in whole.grads.items():
        assert (parts.grads[name] - grad).abs().max() < 1e-10
    assert abs(one.metrics["train/loss"] - many.metrics["train/loss"]) < 1e-10


def test_without_weights_a_ragged_micro_batch_counts_by_its_samples():
    class Plain(Ragged):
        def train_step(self, batch):
            x, _, target = batch
            return F.mse_loss(self.net(x), target)

    whole, parts = Plain("mse", whole=True), Plain("mse", whole=False)
    quiet(precision="fp64").run(whole)
    quiet(precision="fp64", accumulate=len(SIZES)).run(parts)
    for name, grad in whole.grads.items():
        assert (parts.grads[name] - grad).abs().max() < 1e-10


def test_the_last_shorter_group_of_an_epoch_is_scaled_by_its_own_size():
    class Sums(Ragged):
        def train_step(self, batch):
            x, _, target = batch
            return F.mse_loss(self.net(x), target)

    task, seen = Sums("mse", whole=False), []
    fit = quiet(precision="fp64", accumulate=3)
    fit.on("before_update", lambda run, norm: seen.append(task.net[0].weight.grad.clone()))
    fit.run(task)
    x, _, target = task.train_data()[-1]
    task.zero_grad()
    F.mse_loss(task.net(x), target).backward()
    assert len(seen) == 2
    torch.testing.assert_close(seen[1], task.net[0].weight.grad, rtol=0, atol=1e-12)
