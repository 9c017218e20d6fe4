"""Jobs on DDP's parameters, the choice of a strategy, and loops and steps of a user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from loopkit import DDP, FSDP, ClosureStep, Hook, Loader, SingleDevice, Task
from loopkit.hooks import Unfreeze
from loopkit.optim import SGD, AdamW
from loopkit.strategies.dtensor import full_tensor
from tests.contract.tasks import TASKS
from tests.support import Tiny, digest, points, quiet


def unfreeze() -> dict[str, Any]:
    """Train with the first layer frozen until step 3; return whether it moved."""
    task = Tiny(dropout=0.0)
    before = task.net[0].weight.detach().clone()
    quiet(strategy="ddp", batch_size=8, epochs=2, hooks=[Unfreeze({3: r"net\.0"})]).run(task)
    return {
        "digest": digest(task.state_dict()),
        "moved": not torch.equal(before, task.net[0].weight),
    }


class Idle(Tiny):
    """Tiny with a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)


def unused() -> str:
    """Return the error for an unused layer; the option that it names works."""
    told = ""
    try:
        quiet(strategy="ddp", batch_size=8).run(Idle())
    except Exception as error:
        told = str(error)
    quiet(strategy=DDP(find_unused_parameters=True), batch_size=8).run(Idle())
    return told


def by_hand(strategy: str) -> str:
    """Run a hand-written loop, in which each rank has its half of every batch; digest the weights."""
    made = {"single": SingleDevice, "ddp": DDP, "fsdp": FSDP}[strategy]("cpu")
    task, data = Tiny(dropout=0.0), points(64)
    made.setup_environment()
    made.setup_module(task)
    made.setup_optimizers({"main": torch.optim.AdamW(task.parameters(), lr=1e-2, fused=True)})
    step, ranks = made.step_fn("train_step"), made.world_size
    for start in range(0, 64, 16):
        parts = [data[start : start + 8], data[start + 8 : start + 16]]
        mine = parts[made.rank :: ranks]
        for number, batch in enumerate(mine):
            made.set_gradient_sync(number == len(mine) - 1)
            made.backward(step(batch) / len(mine))
        made.finalize_gradients()
        made.optimizer_step()
    weights = {name: full_tensor(t) for name, t in made.model_state().items()}
    made.teardown()
    return digest(weights)


def prepared_loop(name: str, epochs: int, **options: Any) -> dict[str, Any]:
    """Run a loop by hand over a prepared task; return its evaluation and the weights' digest."""
    task = TASKS[name]()
    with quiet(epochs=epochs, **options).prepare(task) as ready:
        for _ in range(epochs):
            for batch in ready.batches():
                ready.backward(ready.forward(batch))
                ready.step()
        metrics = ready.evaluate() if ready.run.eval_data else {}
        weights = {name: full_tensor(t) for name, t in ready.run.strategy.model_state().items()}
    return {"digest": digest(weights), **metrics}


def strategy_of(name: str) -> tuple[str, int]:
    """Return the class of a run's strategy, and the number of ranks."""
    found = []
    fit = quiet(strategy=name, steps=1)
    fit.on(
        "setup", lambda run: found.append((type(run.strategy).__name__, run.strategy.world_size))
    )
    fit.run(Tiny())
    return found[0]


def other_number() -> str:
    """Return the error for three devices where two processes were started."""
    try:
        quiet(strategy="ddp", devices=3, steps=1).run(Tiny())
    except Exception as error:
        return str(error)
    return ""


def own_step(name: str, ranks: int) -> dict[str, Any]:
    """Train a task with a StepLoop of its own for a few steps."""
    from tasks.gan import RingGan
    from tasks.sam import NoisyDigits

    torch.manual_seed(0)
    task = RingGan(hidden=16) if name == "gan" else NoisyDigits()
    strategy = "ddp" if ranks > 1 else "single"
    quiet(strategy=strategy, batch_size=16, accumulate=2 // ranks, steps=6, eval_every="never").run(
        task
    )
    return {
        "digest": digest(task.state_dict()),
        "model": {n: t.clone() for n, t in task.state_dict().items()},
    }


def rows_logged_on_one_rank() -> list[float]:
    """The values that a hook of rank 0 logs at the end of each epoch, as each rank has them."""

    class RankZero(Hook):
        def on_epoch_end(self, run: Any) -> None:
            if run.strategy.rank == 0:
                run.log({"only": float(run.strategy.rank)})

    result = quiet(strategy="ddp", epochs=2, hooks=[RankZero()], eval_every="never").run(Tiny())
    return [row["only"] for row in result.history if "only" in row]


class Unusual(Task):
    """Complex layers, or a sparse embedding of which a rank may see nothing but padding."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.words = nn.Embedding(10, 4, padding_idx=0, sparse=kind == "sparse")
        self.waves = nn.Linear(4, 1, dtype=torch.cfloat if kind == "complex" else None)

    def train_step(self, batch: Any) -> Any:
        words = self.words(batch[0]).sum(1)
        return (self.waves(words.to(self.waves.weight.dtype)).abs() - batch[1]).square().mean()

    def optimizers(self) -> Any:
        return SGD(lr=0.1, momentum=0.9)

    def train_data(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        words = torch.randint(1, 10, (32, 3), generator=generator)
        words[0::8] = words[2::8] = words[4::8] = words[6::8] = 0
        return Loader(
            TensorDataset(words, torch.randn(32, 1, generator=generator)), 4, shuffle=False
        )


def unusual(strategy: str, kind: str, accumulate: int = 1, **options: Any) -> Any:
    """Train with complex or sparse gradients; return the weights."""
    task = Unusual(kind)
    quiet(strategy=strategy, accumulate=accumulate, epochs=2, **options).run(task)
    return {name: full_tensor(value) for name, value in task.state_dict().items()}


class FreedLater(Tiny):
    """Tiny with a first layer that it frees at step 3, and an optimizer over all, or over the rest."""

    def __init__(self, everything: bool) -> None:
        super().__init__(dropout=0.0)
        self.everything = everything
        self.net[0].requires_grad_(False)

    def on_step_start(self, run: Any, batches: Any) -> None:
        if run.progress.step == 3:
            self.net[0].requires_grad_(True)

    def optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01) if self.everything else AdamW(lr=0.01)


def freed(
    strategy: str, everything: bool, stops: Any = (), accumulate: int = 1, **options: Any
) -> Any:
    """Train, stop and resume; return the weights, or the error."""
    try:
        for stop in (*stops, None):
            task = FreedLater(everything)
            fit = quiet(strategy=strategy, batch_size=8, accumulate=accumulate, epochs=2, **options)
            fit.on(
                "step_end",
                lambda run, out, stop=stop: run.stop("x") if run.progress.step == stop else None,
            )
            fit.run(task)
    except Exception as error:
        return str(error)
    return {name: full_tensor(value) for name, value in task.state_dict().items()}


class Curved(Tiny):
    """Tiny with LBFGS and a line search, which compares losses."""

    def optimizers(self) -> Any:
        return torch.optim.LBFGS(
            self.parameters(), lr=0.5, max_iter=4, line_search_fn="strong_wolfe"
        )


def lbfgs(strategy: str, accumulate: int = 1) -> Any:
    """Train with LBFGS; return the weights and the logged losses, or the error."""
    task = Curved(dropout=0.0)
    try:
        result = quiet(
            strategy=strategy,
            batch_size=30,
            accumulate=accumulate,
            steps=4,
            log_every=1,
            precision="fp64",
            eval_every="never",
            step=ClosureStep(),
        ).run(task)
    except Exception as error:
        return str(error)
    return task.state_dict(), [row["train/loss"] for row in result.history]
