"""Jobs on layers that are split over the ranks of a tensor-parallel group."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loopkit import Loader, Task, TensorParallel
from loopkit.sharded import local_tensor
from loopkit.strategies.dtensor import full_tensor
from tests.contract.jobs import TINY, WORDS, make
from tests.contract.tasks import TokenClassifier
from tests.support import Tiny, digest, quiet


class Sequence(Task):
    """Norms before and after a block, on activations of [batch, length, width]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.out, self.head = nn.LayerNorm(8), nn.Linear(8, 10)

    def train_step(self, batch: Any) -> torch.Tensor:
        x = self.embed(batch)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return F.cross_entropy(self.head(self.out(x)).flatten(0, 1), batch.flatten())

    def optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def train_data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        return [torch.randint(0, 10, (2, 4), generator=generator) for _ in range(4)]


def split_sequence() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the weights after a run with norms on split activations, and after one alone."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": "sequence_parallel",
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "out": "sequence_parallel",
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    found = []
    for strategy in (TensorParallel(plan), "single"):
        task = Sequence()
        quiet(strategy=strategy, epochs=1, clip_norm=0.1).run(task)
        found.append({name: full_tensor(t).detach() for name, t in task.state_dict().items()})
    return found[0], found[1]


def parts(strategy: Any) -> dict[str, int]:
    """Count the elements of a layer that is split and of one that is not, on this rank and in all."""
    task = TokenClassifier()
    quiet(strategy=make(strategy), batch_size=8, steps=1).run(task)
    up, norm = task.blocks[0].up.weight, task.blocks[0].norm.weight
    return {
        "up": local_tensor(up).numel(),
        "whole": up.numel(),
        "norm": local_tensor(norm).numel(),
        "norm whole": norm.numel(),
    }


class Sharded(Tiny):
    """Tiny whose ranks read data of their own."""

    def train_data(self) -> Any:
        return Loader(super().train_data(), sharded=True)


def refused(case: str) -> str:
    """Return the error for a strategy or a run that is refused."""
    plans = {
        "missing": {"blocks.*.upp": "colwise"},
        "style": {"head": "colwize"},
        "odd": {"head": "colwise"},
        "norm": {"blocks.*.norm": "rowwise"},
        "sharded": TINY,
        "auto": "auto",
        "tied": {"embed": "rowwise_rep"},
    }
    task: Task = (
        Sharded() if case == "sharded" else Sequence() if case == "tied" else TokenClassifier()
    )
    if isinstance(task, Sequence):
        task.head.weight = task.embed.weight
    try:
        strategy = TensorParallel(plans.get(case, WORDS), size=3 if case == "uneven" else None)
        quiet(strategy=strategy, steps=1, precision="fp16" if case == "fp16" else "fp32").run(task)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Late(TokenClassifier):
    """Makes its layers in configure_model."""

    def __init__(self) -> None:
        Task.__init__(self)
        self.count = 24

    def configure_model(self) -> None:
        made = TokenClassifier(dropout=0.0)
        for name, module in made.named_children():
            setattr(self, name, module)


def built_late() -> tuple[str, str]:
    """Digest the weights, before training, of a task that is made in configure_model."""
    task, seen = Late(), []
    fit = quiet(strategy=make("tensor"), batch_size=8, steps=1)
    fit.on(
        "fit_start",
        lambda run: seen.append(
            digest({name: full_tensor(t) for name, t in task.state_dict().items()})
        ),
    )
    fit.run(task)
    return seen[0]


def built_late_alone() -> str:
    """Digest the weights of the same task in one process."""
    return digest(TokenClassifier(dropout=0.0).state_dict())
