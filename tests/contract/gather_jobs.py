"""Jobs for losses over the outputs of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import loopkit
from loopkit import Task
from loopkit.errors import LoopkitError
from loopkit.optim import AdamW
from loopkit.strategies.dtensor import full_tensor
from tests.contract import jobs
from tests.support import quiet


class Pairs(Task):
    """Two views of each sample are to be nearer than those of any other sample in the batch."""

    def __init__(self, count: int, weighted: bool = False, in_eval: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.count, self.weighted, self.in_eval = count, weighted, in_eval
        self.left = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.right = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def train_step(self, batch: Any) -> Any:
        a = F.normalize(self.left(batch[0]), dim=-1)
        b, mine = loopkit.all_gather(F.normalize(self.right(batch[1]), dim=-1))
        target = torch.arange(mine.start, mine.stop)
        loss = F.cross_entropy(a @ b.T * self.scale.exp(), target)
        return {"loss": loss, "weight": len(a)} if self.weighted else loss

    def eval_step(self, batch: Any) -> dict[str, Any]:
        return {"loss": self.train_step(batch) if self.in_eval else batch[0].mean()}

    def optimizers(self) -> Any:
        return AdamW(lr=0.02)

    def train_data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(self.count, 6, generator=generator)
        return TensorDataset(x, x + 0.1 * torch.randn(self.count, 6, generator=generator))

    eval_data = train_data


def train(strategy: Any, count: int, weighted: bool = False, **options: Any) -> Any:
    """Return the weights of two passes."""
    task = Pairs(count, weighted)
    quiet(strategy=jobs.make(strategy), epochs=2, eval_every="never", **options).run(task)
    return {name: full_tensor(p).detach().clone() for name, p in task.named_parameters()}


def in_evaluation(strategy: Any) -> str:
    """Return what an evaluation says that gathers."""
    try:
        quiet(strategy=strategy, batch_size=4).evaluate(Pairs(8, in_eval=True))
    except LoopkitError as error:
        return str(error)
    return ""


def of_other_shapes(strategy: Any) -> str:
    """Return what is said where the rows of the ranks do not fit together."""

    class Odd(Pairs):
        def train_step(self, batch: Any) -> Any:
            z = self.right(batch[1])
            import torch.distributed as dist

            return loopkit.all_gather(z[:, : 2 + dist.get_rank()])[0].sum()

    try:
        quiet(strategy=strategy, batch_size=4, steps=1, eval_every="never").run(Odd(8))
    except LoopkitError as error:
        return str(error)
    return ""
