"""LightningModules on several ranks, which every rank runs alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loopkit.interop import LightningTask
from loopkit.strategies.dtensor import full_tensor
from tests.contract.jobs import make
from tests.interop import lightning_modules as public
from tests.support import quiet


class Skips(public.AutoEncoder):
    """Leaves out some batches, each rank others; without momentum, so that a gradient of 0 moves nothing."""

    def training_step(self, batch, batch_idx):
        return None if batch[0][0, 0] > 0.5 else super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SkipsAll(Skips):
    """Leaves out all batches."""

    def training_step(self, batch, batch_idx):
        return None


def modules(name: str) -> Any:
    """Modules whose result does not depend on how a batch is split."""
    if name == "classifier":
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3))
        return public.Classifier(net)
    kinds = {"by hand": public.ByHand, "autoencoder": public.AutoEncoder, "gan": public.GAN}
    return {**kinds, "skips": Skips, "skips all": SkipsAll}[name]()


def train(
    strategy: Any, name: str, size: int = 8, stop_at: int | None = None, **options: Any
) -> dict[str, Any]:
    """Train; return the weights, the logged rows and what the module sees of its trainer."""
    torch.manual_seed(5)
    module = modules(name)
    part = slice(0, 61)  # the last step is a short one, of some ranks alone
    task = LightningTask(
        module,
        train_dataloaders=public.loader(part, size=size),
        val_dataloaders=public.loader(slice(60, 87), size=4, shuffle=False),
    )
    fit = quiet(strategy=make(strategy), epochs=3, log_every=1, **{"precision": "fp64", **options})
    if stop_at is not None:
        fit.on("step_end", lambda run, out: run.stop("t") if run.progress.step == stop_at else None)
    result = fit.run(task)
    trainer = module.trainer
    rows = [
        {k: v for k, v in row.items() if not k.endswith(("runtime", "per_second", "grad_norm"))}
        for row in result.history
    ]
    return {
        "weights": {name: full_tensor(p.detach()).cpu() for name, p in module.named_parameters()},
        "rows": rows,
        "seen": (trainer.global_step, trainer.current_epoch, trainer.world_size),
        "rank": trainer.global_rank,
        "values": {name: float(v) for name, v in trainer.callback_metrics.items()},
    }
