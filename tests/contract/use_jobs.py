"""Jobs for steps that use other parameters on each rank, and for parameters that modules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from loopkit import Loader, Task
from loopkit.errors import LoopkitError
from loopkit.optim import AdamW
from loopkit.strategies.dtensor import full_tensor
from tests.contract import jobs
from tests.support import quiet

SIZE = 2  # samples in a micro-batch


class Numbered(Dataset):
    """Eight samples; the number of its micro-batch tells a step what to use."""

    def __len__(self) -> int:
        return 8 * SIZE

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        return {"x": x, "turn": torch.tensor(index // SIZE)}


class Parts(Task):
    """A task whose step uses the parts that ``uses`` names for a micro-batch's number."""

    def __init__(self, uses: str, shapes: tuple[int, int] = (2, 2), scalars: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.uses = uses
        self.body = nn.Linear(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(4, size) for size in shapes])
        shape = () if scalars else (1,)
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(shape)) for _ in range(2)])
        self.idle = nn.Linear(4, 4)  # no step uses it

    def train_step(self, batch: Any) -> torch.Tensor:
        turn = int(batch["turn"][0])
        h, loss = self.body(batch["x"]), torch.zeros(())
        layers, heads, scales = USES[self.uses](turn)
        for index in layers:
            h = h + self.layers[index](h).tanh()
        for index in scales:
            h = h * self.scales[index]
        for index, counted in heads.items():
            out = self.heads[index](h).pow(2).mean()
            loss = loss + (out if counted else out.detach())
        return loss

    def optimizers(self) -> Any:
        return AdamW(lr=0.05, weight_decay=0.1)

    def train_data(self) -> Any:
        return Loader(Numbered(), batch_size=SIZE, shuffle=False)


ALL = (0, 1, 2), {0: True, 1: True}, (0, 1)
# For a micro-batch's number: layers in order, heads with whether the loss counts them, and scales.
# Two ranks get the even and the odd numbers.
USES: dict[str, Callable[[int], tuple[Any, dict[int, bool], Any]]] = {
    "heads": lambda turn: ((0, 1, 2), {turn % 2: True}, (0, 1)),
    "modality": lambda turn: ((0, 1, 2), dict.fromkeys(range(1 + turn % 2), True), (0, 1)),
    "skipped layers": lambda turn: ((0, 1, 2)[turn % 2 :], {0: True, 1: True}, (0, 1)),
    "order": lambda turn: ((0, 1, 2) if turn % 2 else (0, 2, 1), {0: True, 1: True}, (0, 1)),
    "not in the loss": lambda turn: ((0, 1, 2), {0: True, 1: turn % 2 == 0}, (0, 1)),
    "scalars": lambda turn: ((0, 1, 2), {0: True, 1: True}, (turn % 2,)),
    "same on all": lambda turn: ((0, 1, 2)[turn // 4 :], {turn // 2 % 2: True}, (0,)),
    "later": lambda turn: ALL if turn != 5 else ((0, 1), {0: True, 1: True}, (0, 1)),
}


def parts(
    strategy: Any,
    uses: str,
    shapes: tuple[int, int] = (2, 2),
    *,
    scalars: bool = True,
    **options: Any,
) -> dict[str, torch.Tensor] | str:
    """Return the trained weights, or the error and whether the weights are those of the start."""
    task = Parts(uses, shapes, scalars)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    try:
        quiet(strategy=jobs.make(strategy), epochs=2, **options).run(task)
    except LoopkitError as error:
        held = {name: full_tensor(p) for name, p in task.named_parameters()}
        same = all(torch.equal(held[name], before[name]) for name in before)
        return f"{type(error).__name__}: {error} [{'untrained' if same else 'trained'}]"
    return {name: full_tensor(p).detach().clone() for name, p in task.named_parameters()}


def deepspeed_parts(strategy: Any, uses: str, shapes: tuple[int, int]) -> Any:
    """Return what ``parts`` does, of a task without scalars, which stage 3 refuses."""
    return parts(strategy, uses, shapes, scalars=False)


class Sharing(Task):
    """A language model with tied embeddings, in which blocks share what ``share`` names."""

    def __init__(self, share: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        if share == "weight":
            for block in list(self.blocks)[1:]:
                block.up.weight = self.blocks[0].up.weight
        elif share == "module":
            self.blocks[2].up = self.blocks[0].up
        elif share == "block":
            self.blocks.append(self.blocks[0])
        elif share == "embedding":
            self.blocks[1].table = self.embed
        elif share == "nested":
            self.blocks[0].inner = Block()
            self.blocks[0].inner.up.weight = self.blocks[0].up.weight

    def train_step(self, batch: Any) -> torch.Tensor:
        h = self.embed(batch["x"].abs().mul(3).long().clamp(max=10))
        for block in self.blocks:
            h = block(h)
        return nn.functional.cross_entropy(
            self.head(h).flatten(0, 1), batch["turn"].repeat_interleave(4)
        )

    def optimizers(self) -> Any:
        return AdamW(lr=0.05, weight_decay=0.1)

    def train_data(self) -> Any:
        return Loader(Numbered(), batch_size=SIZE, shuffle=False)


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.inner: nn.Module = nn.Identity()
        self.table: nn.Module | None = None

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = self.inner(h)
        if self.table is not None:
            h = h + self.table.weight.mean(0)
        return h + self.down(torch.relu(self.up(h)))


def sharing(strategy: Any, share: str, **options: Any) -> tuple[dict[str, torch.Tensor], int]:
    """Return the trained weights, and how many modules are gathered by themselves."""
    task = Sharing(share)
    quiet(strategy=jobs.make(strategy), epochs=2, clip_norm=1.0, **options).run(task)
    gathered = sum(type(m).__name__.startswith("FSDP") for m in task.modules())
    weights = {
        name: full_tensor(p).detach().clone()
        for name, p in task.named_parameters(remove_duplicate=False)
    }
    return weights, gathered
