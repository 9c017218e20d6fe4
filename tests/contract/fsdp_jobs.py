"""Jobs on sharded parameters."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loopkit import FSDP, Checkpoint, Compile, Task
from loopkit.sharded import local_tensor
from loopkit.strategies.dtensor import full_tensor
from tests.contract import jobs
from tests.contract.tasks import TASKS, Block, TokenClassifier
from tests.support import Tiny, digest, quiet


def sizes() -> dict[str, Any]:
    """Count the numbers that this rank holds, of parameters and of optimizer state."""
    task, found = (
        TokenClassifier(width=32),
        {"whole": sum(p.numel() for p in TokenClassifier(width=32).parameters())},
    )
    fit = quiet(strategy="fsdp", batch_size=4, steps=3, eval_every="2 steps")

    @fit.on("fit_end")
    def look(run: Any) -> None:
        found["state"] = sum(
            local_tensor(t).numel()
            for s in run.optimizers["main"].state.values()
            for t in s.values()
            if t.ndim
        )

    @fit.on("eval_end")
    def after(run: Any, metrics: Any) -> None:
        found["after evaluation"] = sum(local_tensor(p).numel() for p in task.parameters())

    fit.run(task)
    from loopkit.task import name_of

    found["parameters"] = sum(local_tensor(p).numel() for p in task.parameters())
    found["class"] = name_of(task)
    return found


class Late(TokenClassifier):
    """Makes its layers in configure_model, two of them tied, and notes their device."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.count, self.made_on = 52, []

    def configure_model(self) -> None:
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList([Block(16, 0.1) for _ in range(2)])
        self.head = nn.Linear(16, 5)
        self.out = nn.Linear(16, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.full((), 2.0), persistent=False)
        self.made_on.append(self.embed.weight.device.type)

    def train_step(self, batch: Any) -> Any:
        told = super().train_step(batch)
        x = self.embed(batch["input_ids"])
        return {
            **told,
            "loss": told["loss"]
            + 0.1
            * self.scale
            * F.cross_entropy(self.out(x).flatten(0, 1), batch["input_ids"].flatten()),
        }


def built_late(strategy: Any = "fsdp") -> dict[str, Any]:
    """Train what configure_model makes; return where it was made, and the weights."""
    task = Late()
    accumulate = 1 if strategy == "fsdp" else 2
    quiet(strategy=strategy, batch_size=8, epochs=1, accumulate=accumulate).run(task)
    weights = {name: full_tensor(t) for name, t in task.state_dict().items()}
    tied = torch.equal(weights["embed.weight"], weights["out.weight"])
    return {"made on": task.made_on, "digest": digest(weights), "tied": tied}


class Scaled(Tiny):
    """Tiny with a scalar parameter and a counter in a buffer."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("steps", torch.zeros(()))

    def train_step(self, batch: Any) -> Any:
        x, y = batch
        return F.cross_entropy(self.net(x) * self.scale, y)


def scalars(strategy: str) -> dict[str, torch.Tensor]:
    """Return the state after training a task with a scalar."""
    return jobs.train(
        strategy,
        "scaled",
        batch_size=8,
        epochs=2,
        clip_norm=0.1,
        accumulate=2 if strategy == "single" else 1,
    )["model"]


TASKS["scaled"] = Scaled


def disk_full(place: Path, rank: int, background: bool) -> tuple[str, list[str]]:
    """Fill the disk of one rank at the second save."""
    import torch.distributed as dist

    from loopkit.checkpoint.store import Store
    from loopkit.errors import DiskFullError

    kept, calls = Store.create, [0]

    def create(self: Any, path: Path, *rest: Any, **more: Any) -> Any:
        calls[0] += "shards" in str(path) and "model-" in str(path)
        if calls[0] > 1 and dist.get_rank() == rank:
            raise DiskFullError(errno.ENOSPC, "no space", str(path))
        return kept(self, path, *rest, **more)

    Store.create = create  # type: ignore[method-assign]
    told = ""
    try:
        save = Checkpoint(every="2 steps", background=background)
        quiet(strategy="fsdp", batch_size=4, epochs=3, checkpoint=save, run_dir=place).run(
            TokenClassifier()
        )
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    finally:
        Store.create = kept  # type: ignore[method-assign]
    return told, sorted(os.listdir(place / "checkpoints"))


def with_hook(name: str, strategy: str, place: Path) -> dict[str, float]:
    """Return what a run with a hook logs last, stopped and resumed halfway."""
    from loopkit import hooks

    arguments: dict[str, Any] = {"EMA": {"decay": 0.5}, "SWA": {"start": 3}}
    options = {
        "batch_size": 4,
        "accumulate": 1 if strategy == "fsdp" else 2,
        "run_dir": place,
        "checkpoint": Checkpoint(every="never"),
        "resume": "auto",
        "epochs": 1,
        "log_every": 1,
        "eval_every": "3 steps",
    }
    made = [getattr(hooks, name)(**arguments.get(name, {}))]
    jobs.train(strategy, "words", stop_at=4, **{**options, "hooks": made})
    rows: dict[str, float] = {}
    fit = quiet(
        strategy=strategy, **{**options, "hooks": [getattr(hooks, name)(**arguments.get(name, {}))]}
    )
    fit.on("log", lambda run, values: rows.update(values))
    fit.run(TokenClassifier())
    return {
        name: value for name, value in rows.items() if "per_second" not in name and name != "mfu"
    }


def bad_wrap() -> str:
    """Return the error for a class that the task does not have."""
    try:
        quiet(strategy=FSDP(wrap=["Blok"]), steps=1).run(TokenClassifier())
    except Exception as error:
        return str(error)
    return ""


def compiled(wanted: bool, strategy: str = "fsdp", **options: Any) -> Any:
    """Train with or without compiled blocks (no code generation, which takes a minute)."""
    return jobs.train(
        strategy,
        "words",
        compile=Compile(scope="blocks", backend="aot_eager") if wanted else False,
        **options,
    )


class Named(TokenClassifier):
    """A TokenClassifier with an optimizer by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def optimizers(self) -> Any:
        from loopkit import optim

        return optim.build(self.name, lr=1e-2)


TASKS["named"] = Named


def optimized(name: str, strategy: str, accumulate: int = 1) -> dict[str, Any]:
    """Train with the optimizer of that name."""
    return jobs.train(
        strategy,
        "named",
        {"name": name},
        batch_size=8,
        steps=4,
        accumulate=accumulate,
        eval_every="never",
    )


def refused_optimizer(name: str, strategy: str) -> str:
    """Return the error for an optimizer that needs whole parameters."""
    try:
        optimized(name, strategy)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Wide(Task):
    """Two layers of 16 MB each; optimizer state takes twice as much again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2000, 2000, bias=False) for _ in range(2)])

    def train_step(self, batch: Any) -> torch.Tensor:
        return self.layers[1](self.layers[0](batch)).square().mean()

    def optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_data(self) -> Any:
        return [torch.ones(2, 2000)] * 8


def memory_to_resume(place: Path, maps: bool) -> tuple[int, str]:
    """Resume with or without memory maps of the checkpoint.

    Returns:
        The most bytes that this rank's own memory grew by while it read, and a digest of weights.
    """
    import threading

    from loopkit.checkpoint import Store
    from loopkit.fit import checkpointer

    task, seen, over, kept = Wide(), [], threading.Event(), checkpointer.open_checkpointer

    def watch() -> None:
        while not over.wait(0.001):
            seen.append(own_memory())

    def open_checkpointer(*arguments: Any) -> None:
        thread = threading.Thread(target=watch)
        # Memory that is free already would not show when it is used again.
        ctypes.CDLL(None).malloc_trim(0)
        seen.append(own_memory())
        thread.start()
        kept(*arguments)
        over.set()
        thread.join()

    import loopkit.fit.lifecycle

    loopkit.fit.lifecycle.open_checkpointer, init = open_checkpointer, Store.__init__
    if not maps:
        Store.__init__ = lambda self, **how: None  # type: ignore[method-assign,misc]
    try:
        quiet(strategy="fsdp", epochs=1, resume="auto", checkpoint=True, run_dir=place).run(task)
    finally:
        loopkit.fit.lifecycle.open_checkpointer, Store.__init__ = kept, init  # type: ignore[method-assign]
    return max(seen) - seen[0], digest(
        {name: full_tensor(t) for name, t in task.state_dict().items()}
    )


def train_wide(place: Path) -> None:
    """Save a checkpoint of Wide."""
    quiet(strategy="fsdp", steps=2, checkpoint=True, run_dir=place).run(Wide())


def own_memory() -> int:
    """Return the bytes of this process that do not belong to a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def dry_run() -> bool:
    """Return whether a dry run left the weights."""
    task = TokenClassifier()
    before = {name: t.clone() for name, t in task.state_dict().items()}
    quiet(strategy="fsdp", batch_size=4, dry_run=True).run(task)
    return all(torch.equal(full_tensor(t), before[name]) for name, t in task.state_dict().items())


def many_fits(strategy: Any, count: int, place: Path) -> list[tuple[int, int]]:
    """Return the open files and the threads of this process after each of ``count`` Fits."""
    import gc
    import sys

    from loopkit.fit import strategy_setup

    found, hook = [], sys.excepthook
    for number in range(count):
        # As a library may do that reports errors.
        sys.excepthook = lambda *about: None
        quiet(
            strategy=jobs.make(strategy), steps=2, checkpoint=True, run_dir=place / str(number)
        ).run(TokenClassifier())
        gc.collect()
        status = Path("/proc/self/status").read_text()
        threads = next(line for line in status.splitlines() if line.startswith("Threads"))
        found.append((len(os.listdir("/proc/self/fd")), int(threads.split()[1])))
    sys.excepthook = hook
    assert strategy_setup._reporter.cache_info().currsize == 1
    return found


def stepped(hooked: bool) -> tuple[str, int]:
    """Train with a fused AdamW; return the digest of the weights, and how often torch stepped it.

    Args:
        hooked: gives the optimizer a hook, so that torch itself steps it.
    """
    calls: list[Any] = []

    class Stepped(TokenClassifier):
        def optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)
            if hooked:
                optimizer.register_step_post_hook(lambda *_: None)
            return optimizer

    # torch calls it in each step of its own.
    original = torch.optim.AdamW._init_group
    torch.optim.AdamW._init_group = lambda *given: calls.append(0) or original(*given)
    try:
        task = Stepped()
        quiet(strategy="fsdp", batch_size=4, steps=6, eval_every="never").run(task)
    finally:
        torch.optim.AdamW._init_group = original
    return digest({name: full_tensor(p) for name, p in task.named_parameters()}), len(calls)
