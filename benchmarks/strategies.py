"""Cost of a training step over two ranks: loopkit, hand-written loops and the peers.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/strategies.py                    # a quarter of an hour on two idle cores

The ranks are two processes over gloo, with one torch thread each. Every contestant trains the same
small GPT from the same weights on the same batches. Each contestant has two ranks of its own, new
ones in each round, and they take turns of a few steps. A check compares the final weights within a
kind. The clock is in the user's code, on rank 0, as in ``overhead.py``.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import record
from benchmarks.overhead import quiet
from benchmarks.peers import PreparedBatches
from benchmarks.turns import MISSING, TUNED, TurnClock, rounds_of, wait_for_turn
from loopkit import DDP, FSDP, Fit, Task
from loopkit.distributed.environment import find_rank_info
from loopkit.distributed.launcher import die_with_parent, launch
from loopkit.distributed.process_group import init_process_group

RANKS, BATCH, LENGTH, WIDTH, LAYERS, VOCABULARY = 2, 8, 64, 128, 4, 96
BLOCKS, LR = 16, 1e-3
BASE = "by hand"
PATIENCE = 3600  # seconds that a rank waits for the turns of others
PACKAGES = ("torch", "loopkit-torch", "lightning", "accelerate")


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Gpt(nn.Module):
    """A GPT that returns its loss and records the time of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.clock: Callable[[], float] = perf_counter
        self.stamps: list[float] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.stamps.append(self.clock())
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


class Job:
    """One run: the model, and this rank's batches."""

    def __init__(self, rank: int, block: int) -> None:
        torch.manual_seed(0)
        self.rank, self.steps = rank, block * (BLOCKS + 1) + 1
        self.model = Gpt()
        generator = torch.Generator().manual_seed(1)
        shape, count = (BATCH, LENGTH), RANKS * self.steps
        self.all = [torch.randint(0, VOCABULARY, shape, generator=generator) for _ in range(count)]
        self.data = self.all[rank::RANKS]

    def optimizer(self) -> torch.optim.Optimizer:
        """Return fused AdamW over the current parameters of the model."""
        return torch.optim.AdamW(self.model.parameters(), lr=LR, fused=True)


def loop(job: Job, model: Any) -> None:
    """Run the best hand-written loop around a wrapped or sharded model."""
    optimizer = job.optimizer()
    for ids in job.data:
        model(ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def hand_ddp(job: Job) -> None:
    """Run torch's DistributedDataParallel by hand."""
    loop(job, torch.nn.parallel.DistributedDataParallel(job.model))


def hand_fsdp(job: Job) -> None:
    """Run torch's fully_shard by hand, on each block."""
    from torch.distributed.fsdp import fully_shard

    for block in job.model.blocks:
        fully_shard(block)
    fully_shard(job.model, reshard_after_forward=False)
    loop(job, job.model)


class Language(Task):
    """The job as a Task."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job, self.model = job, job.model

    def train_step(self, batch: Tensor) -> Tensor:
        return self.model(batch)

    def optimizers(self) -> Any:
        return self.job.optimizer()

    def train_data(self) -> Any:
        # Fit splits the batches among the ranks.
        return self.job.all


def ours(strategy: Any) -> Callable[[Job], None]:
    """Return a contestant: Fit with its defaults, without logs and files."""

    def train(job: Job) -> None:
        options: dict[str, Any] = {
            "loggers": None,
            "progress": False,
            "checkpoint": False,
            "log_every": "never",
        }
        with tempfile.TemporaryDirectory() as folder:
            Fit(strategy=strategy(), run_dir=folder, **options).run(Language(job))

    return train


def lightning(strategy: str) -> Callable[[Job], None]:
    """Return a contestant: Lightning's Trainer."""

    def train(job: Job) -> None:
        import lightning.pytorch as pl

        class Module(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = job.model

            def configure_model(self) -> None:
                if strategy == "fsdp2":
                    from torch.distributed.fsdp import fully_shard

                    for block in self.model.blocks:
                        fully_shard(block, mesh=self.device_mesh["data_parallel"])
                    fully_shard(
                        self.model,
                        mesh=self.device_mesh["data_parallel"],
                        reshard_after_forward=False,
                    )

            def training_step(self, batch: Any, index: int) -> Any:
                return self.model(batch)

            def configure_optimizers(self) -> Any:
                return job.optimizer()

        from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

        sizes = {"data_parallel_size": RANKS, "tensor_parallel_size": 1}
        how: Any = DDPStrategy() if strategy == "ddp" else ModelParallelStrategy(**sizes)
        trainer = pl.Trainer(
            strategy=how,
            accelerator="cpu",
            devices=RANKS,
            max_epochs=1,
            enable_model_summary=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
        )
        trainer.fit(Module(), PreparedBatches(job.data))

    return train


def accelerate(job: Job) -> None:
    """Run a hand-written loop around Accelerate's wrappers."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(job.model, job.optimizer())
    for ids in job.data:
        accelerator.backward(model(ids))
        optimizer.step()
        optimizer.zero_grad()


KINDS: dict[str, dict[str, Callable[[Job], None]]] = {
    "DDP": {
        BASE: hand_ddp,
        TUNED: hand_ddp,
        "loopkit": ours(DDP),
        "lightning": lightning("ddp"),
        "accelerate": accelerate,
    },
    "FSDP": {
        BASE: hand_fsdp,
        TUNED: hand_fsdp,
        "loopkit": ours(FSDP),
        "lightning": lightning("fsdp2"),
    },
}


def once(
    train: Callable[[Job], None], rank: int, block: int, clock: Callable[[], float]
) -> tuple[list[float], list[Tensor]]:
    """Return ms per step of each block of one run, and the trained weights."""
    job = Job(rank, block)
    job.model.clock = clock
    gc.collect()
    with quiet():
        train(job)
    stamps = job.model.stamps
    if len(stamps) != job.steps:
        raise RuntimeError(f"it took {len(stamps)} steps instead of {job.steps}")
    blocks = [(end - start) / block * 1e3 for start, end in pairwise(stamps[block::block])]
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in job.model.parameters()]
    return blocks, [weight.detach() for weight in weights]


def contest(kind: str, contestant: str, block: int, weights_file: Path) -> None:
    """Train once for each line of input, on both ranks; rank 0 prints the ms per step of the blocks.

    During training, each line of input is another turn.
    """
    rank_info = find_rank_info()
    if rank_info is None:
        sys.exit(launch(RANKS, [sys.executable, "-u", *sys.argv]))
    die_with_parent()
    world = init_process_group(rank_info, torch.device("cpu"), PATIENCE)

    def wait() -> None:
        if world.rank == 0:
            wait_for_turn()
        torch.distributed.barrier()  # so that no rank computes in a turn of others

    while world.broadcast_object(sys.stdin.readline() if world.rank == 0 else ""):
        problem = ""
        try:
            clock = TurnClock(wait, calls=block)
            blocks, weights = once(KINDS[kind][contestant], world.rank, block, clock)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        problems = [text for text in world.all_gather_object(problem) if text]
        if world.rank:
            continue
        if problems:
            print(problems[0], file=sys.stderr)
            print(MISSING, flush=True)
        else:
            torch.save(weights, weights_file)
            print(*blocks, flush=True)


def measure(kind: str, rounds: int, block: int) -> dict[str, list[float]]:
    """Return the ms per step of the blocks of all rounds, by contestant.

    Raises:
        RuntimeError: a contestant has trained to other weights than the loop by hand.
    """
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{i}.pt" for i, name in enumerate(KINDS[kind])}
        words = [sys.executable, __file__, "--kind", kind, "--block", str(block)]
        commands = {
            name: [*words, "--contestant", name, "--weights", str(file)]
            for name, file in files.items()
        }
        for name, answer in rounds_of(kind, commands, rounds):
            weights, base = torch.load(files[name]), torch.load(files[BASE])
            if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(weights, base)):
                raise RuntimeError(f"{name} trained to other weights than {BASE}: not the same job")
            found.setdefault(name, []).extend(map(float, answer.split()))
    return found


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(
        description="ms per training step over two ranks, side by side."
    )
    parser.add_argument("--rounds", type=int, default=8, help="runs of each (default: %(default)s)")
    parser.add_argument(
        "--block", type=int, default=5, help="steps of a turn (default: %(default)s)"
    )
    parser.add_argument(
        "--kind", choices=KINDS, action="append", help="measure this alone; writes no results"
    )
    parser.add_argument("--contestant", help="train once for each line of input")
    parser.add_argument("--weights", type=Path, help="where the contestant saves its weights")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if args.contestant:
        contest(args.kind[0], args.contestant, args.block, args.weights)
        return
    settings = {
        kind: record.compared(measure(kind, args.rounds, args.block), BASE, "step")
        for kind in args.kind or KINDS
    }
    for kind, rows in settings.items():
        print(f"\n{kind}\n{'':22}{'ms/step':>10}{'ratio':>8}   quartiles of the ratio")
        for name, row in sorted(rows.items(), key=lambda item: item[1]["ratio"]["median"]):
            ratio, step = row["ratio"], row["step"]["median"]
            quartiles = f"{ratio['low']:.3f} to {ratio['high']:.3f}"
            print(f"{name:22}{step:10.2f}{ratio['median']:8.3f}   {quartiles}")
    if args.kind is None:
        about = {
            "rounds": args.rounds,
            "ranks": RANKS,
            "parameters": sum(p.numel() for p in Gpt().parameters()),
        }
        record.save(
            "strategies", {**about, "versions": record.versions(PACKAGES), "settings": settings}
        )


if __name__ == "__main__":
    main()
