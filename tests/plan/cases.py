"""Cases of the memory plan: what each plans, and what the allocator of torch says of a real run."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import TensorDataset

from loopkit import Fit, Task
from loopkit.optim import SGD, AdamW
from loopkit.options import Options
from loopkit.plan.planned import planned_run
from loopkit.strategies.ddp import DDP
from loopkit.strategies.fsdp import FSDP
from loopkit.strategies.tensor_parallel import TensorParallel

MEASURED = "the measured step"
# Made before the profiler looks, so that no step holds it.
IDS = torch.randint(512, (256, 65), generator=torch.Generator().manual_seed(0))
PICTURES = torch.randn(128, 3, 32, 32), torch.randint(100, (128,))


class Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Language(Task):
    """A small GPT."""

    def __init__(self, width: int = 128, depth: int = 3, momentum: bool = False) -> None:
        super().__init__()
        self.momentum = momentum
        self.embed = nn.Embedding(512, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 512, bias=False)

    def train_step(self, batch: Any) -> Any:
        (ids,) = batch
        x = self.embed(ids[:, :-1])
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
        return {"loss": loss, "weight": (ids[:, 1:] > 0).sum()}

    def optimizers(self) -> Any:
        return SGD(lr=0.1, momentum=0.9) if self.momentum else AdamW(lr=1e-3)

    def train_data(self) -> Any:
        return TensorDataset(IDS)


class Images(Task):
    """Convolutions with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(64 * 16 * 16, 100),
        )  # fmt: skip

    def train_step(self, batch: Any) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def optimizers(self) -> Any:
        return AdamW(lr=1e-3)

    def train_data(self) -> Any:
        return TensorDataset(*PICTURES)


# Each case: the ranks, the task, and the options of Fit.
CASES: dict[str, tuple[int, Any, dict[str, Any]]] = {
    "fp32": (1, Language, {}),
    "bf16": (1, Language, {"precision": "bf16"}),
    "bf16-true": (1, Language, {"precision": "bf16-true"}),
    "fp64": (1, Language, {"precision": "fp64"}),
    "sgd": (1, lambda: Language(momentum=True), {}),
    "accumulate": (1, Language, {"accumulate": 4, "batch_size": 2}),
    "clip": (1, Language, {"clip_norm": 1.0}),
    "checkpointing": (1, Language, {"activation_checkpointing": "full"}),
    "convolutions": (1, Images, {}),
    "ddp": (2, Language, {"strategy": "ddp"}),
    "ddp views": (
        2,
        Language,
        {"strategy": DDP(gradient_as_bucket_view=True), "precision": "bf16"},
    ),
    "ddp accumulate": (2, Language, {"strategy": "ddp", "accumulate": 2}),
    "fsdp": (2, Language, {"strategy": "fsdp"}),
    "fsdp bf16": (2, Language, {"strategy": "fsdp", "precision": "bf16"}),
    "fsdp checkpointing": (2, Language, {"strategy": "fsdp", "activation_checkpointing": "full"}),
    "fsdp accumulate": (2, Language, {"strategy": "fsdp", "accumulate": 3, "batch_size": 4}),
    "tensor parallel": (
        2,
        Language,
        {
            "strategy": TensorParallel(
                {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}, size=2
            )
        },
    ),
    "fsdp keeps": (2, Language, {"strategy": FSDP(reshard_after_forward=False)}),
}


def options_of(case: str) -> dict[str, Any]:
    ranks, _, options = CASES[case]
    common = {"batch_size": 8, "devices": ranks if ranks > 1 else "auto", "steps": 3}
    quiet = {"progress": False, "loggers": None, "checkpoint": False, "eval_every": "never"}
    return {**quiet, **common, **options}


def planned(cases: Iterable[str]) -> dict[str, int]:
    """Return the planned peak of each case. Call it in a process that has joined no ranks."""
    peaks = {}
    for case in cases:
        with planned_run(CASES[case][1], Options(**options_of(case))) as run:
            peaks[case] = run.peak().total
    return peaks


class ReduceInPlace(DefaultReduceScatter):
    """Sums within the input, as NCCL does. gloo sums a copy, which its thread releases at any time."""

    def __call__(
        self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False
    ) -> None:
        dist.all_reduce(input_tensor, op=op, group=group)
        output_tensor.copy_(input_tensor.chunk(dist.get_world_size(group))[dist.get_rank(group)])


def real(case: str, last: int = 3) -> int:
    """Train, and return the most bytes that torch's allocator gave out in a step.

    The profiler sees every allocation and release on the CPU from before the task is made.

    Args:
        case: one of ``CASES``.
        last: the step that ends the run. Of the third to this one the smallest peak counts: gloo's
            threads release their copies late, by chance.
    """
    gc.collect()  # so that nothing from before is released meanwhile
    inside: list[Any] = []
    fit = Fit(**{**options_of(case), "steps": last})

    @fit.on("setup")
    def reduce_in_place(run: Any) -> None:
        for module in run.task.modules():
            if isinstance(module, FSDPModule):
                module.set_custom_reduce_scatter(ReduceInPlace())

    @fit.on("step_start")
    def begin(run: Any, batches: Any) -> None:
        if run.progress.step >= 2:
            inside.append(record_function(MEASURED))
            inside[0].__enter__()

    @fit.on("step_end")
    def end(run: Any, out: Any) -> None:
        if inside:
            inside.pop().__exit__(None, None, None)

    activities = [ProfilerActivity.CPU]
    with tempfile.TemporaryDirectory() as folder:
        fit = fit.with_options(run_dir=folder)
        with profile(activities=activities, profile_memory=True) as profiler:
            fit.run(CASES[case][1]())
    events = profiler.profiler.kineto_results.events()
    steps = [event for event in events if event.name() == MEASURED]
    assert len(steps) == last - 2
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    times, held = [at for at, _ in changes], list(accumulate(change for _, change in changes))
    return min(
        max(held[bisect_left(times, step.start_ns()) : bisect_right(times, step.end_ns())])
        for step in steps
    )


if __name__ == "__main__":
    json.dump(planned(sys.argv[1:] or CASES), sys.stdout)
