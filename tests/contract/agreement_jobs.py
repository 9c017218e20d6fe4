"""Jobs in which one rank is started with something that the others do not have."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import loopkit
from loopkit import Fit, Loader, Task
from loopkit.distributed.process_group import ProcessGroupSetup
from loopkit.errors import OptionError, RunDirError
from loopkit.fit import agreement
from loopkit.optim import SGD
from tests.support import Tiny, quiet


def rank() -> int:
    return int(os.environ["RANK"])


class Points(Dataset):
    """``count`` points."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(2) * index / self.count


class Stream(IterableDataset):
    """Points of this rank alone."""

    def __iter__(self) -> Any:
        yield from (torch.ones(2) * i for i in range(5 + 3 * rank()))


class Plain(Task):
    """A line through points; its arguments may differ by rank."""

    def __init__(
        self,
        lr: float = 0.1,
        width: int = 2,
        count: int = 12,
        data: str = "points",
        device: str = "cpu",
        momentum: float = 0.0,
        order: Any = None,
    ) -> None:
        super().__init__()
        self.lr, self.count, self.data = lr, count, data
        self.net = nn.Linear(2, width)

    def train_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch).square().mean()

    def eval_step(self, batch: torch.Tensor) -> dict[str, Any]:
        return {"loss": self.train_step(batch)}

    def optimizers(self) -> Any:
        return SGD(lr=self.lr, momentum=0.9 * (os.environ.get("MOMENTUM") == str(rank())))

    def train_data(self) -> Any:
        if self.data.startswith("shard"):
            return Loader(Stream(), batch_size=4, sharded=True)
        return Points(self.count)

    def eval_data(self) -> Any:
        return None if self.data.startswith("shard") else Points(self.count)


class Other(Plain):
    """Another task with the same parameters."""


def differing(what: str, strategy: str = "ddp") -> str:
    """Train with ``what`` other on rank 1; return the error and whether a step was taken."""
    other = rank() == 1
    task: Task = Plain()
    options: dict[str, Any] = {}
    undo = lambda: None
    if what in ("lr", "width", "count"):
        task = Plain(**{what: {"lr": 0.01, "width": 3, "count": 16}[what]} if other else {})
    elif what == "task":
        task = Other() if other else Plain()
    elif what in ("seed", "accumulate", "precision", "epochs"):
        value = {"seed": 3, "accumulate": 2, "precision": "bf16", "epochs": 5}[what]
        options = {what: value} if other else {}
    elif what in ("loopkit", "torch"):
        owner, name = (agreement, "__version__") if what == "loopkit" else (torch, "__version__")
        kept = getattr(owner, name)
        if other:
            setattr(owner, name, "0.0.7")
        undo = lambda: setattr(owner, name, kept)
    elif what == "optimizer":
        os.environ["MOMENTUM"] = "1"
        undo = lambda: os.environ.pop("MOMENTUM")
    elif what == "code":
        module = sys.modules[__name__]
        kept = module.__file__
        if other:
            module.__file__ = str(Path(__file__).with_name("tasks.py"))
        undo = lambda: setattr(module, "__file__", kept)
    steps: list[int] = []
    fit = quiet(**{"strategy": strategy, "batch_size": 2, **options})
    fit.on("step_end", lambda run, out: steps.append(run.progress.step))
    try:
        if what == "call" and other:
            fit.evaluate(task)
        else:
            fit.run(task)
    except OptionError as error:
        return f"{error} [{len(steps)} steps]"
    finally:
        undo()
    return "trained"


def allowed(what: str) -> str:
    """Train with a difference that ranks may have."""
    options: dict[str, Any] = {}
    task = Plain()
    if what == "sharded":
        task = Plain(data=f"shards of {rank()}", order=[rank()])
        options = {"steps": 3, "eval_every": "never"}
    elif what == "device":
        task = Plain(device=f"cuda:{rank()}")
    elif what == "sets":
        task = Plain(order={"a", "b", "c", f"{'d'}"})
    elif what == "objects":
        task = Plain(order=[nn.ReLU(), lambda x: x, object()])
    elif what == "hooks":
        options = {"hooks": [loopkit.Hook()] if rank() == 0 else []}
    elif what == "loggers":
        options = {"loggers": "csv" if rank() == 0 else None}
    fit = Fit(strategy="ddp", accelerator="cpu", batch_size=2, checkpoint=False, progress=False,
              **{"loggers": None, **options})  # fmt: skip
    return fit.run(task).status


def apart(place: Path, strategy: str, *, held_by: int | None = None, **options: Any) -> str:
    """Train with a directory for each rank, as on two machines; return the error.

    Args:
        held_by: the rank whose directory holds a checkpoint.
    """
    here, kept = Path.cwd(), agreement._DISK_DELAY
    own = place / f"disk-{rank()}"
    own.mkdir()
    if held_by == rank():
        (own / "runs/a/checkpoints/step-000000000032").mkdir(parents=True)
    os.chdir(own)
    agreement._DISK_DELAY = 0.1
    steps: list[int] = []
    try:
        fit = quiet(**{"strategy": strategy, "batch_size": 2, "epochs": 1, "run_dir": "runs/a",
                       "resume": "auto", "checkpoint": True, **options})  # fmt: skip
        fit.on("step_end", lambda run, out: steps.append(run.progress.step))
        return fit.run(Plain()).status
    except RunDirError as error:
        return f"{error} [{len(steps)} steps]"
    finally:
        os.chdir(here)
        agreement._DISK_DELAY = kept


def other_nodes(nodes: int) -> str:
    """Return what is said where ``nodes`` machines are asked for and one has started ranks."""
    try:
        return quiet(strategy="ddp", nodes=nodes, steps=1).run(Plain()).status
    except OptionError as error:
        return str(error)


def alone_in_a_group(run_dir: str) -> str:
    """Train in one process on each of two ranks that have a process group; return the error."""
    ProcessGroupSetup("cpu", 60).init()
    try:
        quiet(strategy="single", checkpoint=True, run_dir=run_dir, steps=1).run(Tiny())
    except OptionError as error:
        return str(error)
    return ""
