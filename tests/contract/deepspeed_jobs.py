"""Jobs under DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loopkit import Checkpoint, Compile, DeepSpeed, hooks
from loopkit.optim import build
from loopkit.strategies.deepspeed.zero_state import is_partitioned
from tests.contract import jobs
from tests.contract.coordination_jobs import Broken
from tests.contract.fsdp_jobs import Late
from tests.contract.tasks import PartFrozen, Players, TokenClassifier
from tests.support import Tiny, quiet


def built_late(strategy: str) -> dict[str, Any]:
    """Train what configure_model makes, with two tied layers; return the state before and after."""
    task, seen = Late(), {}
    fit = quiet(
        strategy=jobs.make(strategy),
        batch_size=8,
        epochs=1,
        accumulate=2 if strategy == "single" else 1,
    )

    @fit.on("fit_start")
    def look(run: Any) -> None:
        seen["partitioned"] = all(is_partitioned(p) for p in task.parameters())
        seen["held"] = sum(p.numel() for p in task.parameters())

    fit.run(task)
    weights = {name: t.detach().clone() for name, t in task.state_dict().items()}
    left = [name for p in task.parameters() for name in vars(p)]
    tied = task.out.weight is task.embed.weight and torch.equal(
        weights["embed.weight"], weights["out.weight"]
    )
    return {**seen, "weights": weights, "tied": tied, "left": left}


class Watching(Tiny):
    """A task that reads its gradients, which is refused."""

    def on_before_update(self, run: Any, grad_norm: Any) -> None:
        raise AssertionError("nothing is shown")


class By(TokenClassifier):
    """A TokenClassifier with an optimizer by name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def optimizers(self) -> Any:
        return build(self.name, lr=1e-3)


REFUSED: dict[str, Any] = {
    "fp64": lambda: ({"precision": "fp64"}, TokenClassifier),
    "fp16-true": lambda: ({"precision": "fp16-true"}, TokenClassifier),
    "clip_value": lambda: ({"clip_value": 1.0}, TokenClassifier),
    "compile": lambda: ({"compile": True, "strategy": DeepSpeed(stage=3)}, TokenClassifier),
    "several": lambda: ({}, Players),
    "task": lambda: ({}, Watching),
    "GradMonitor": lambda: ({"hooks": [hooks.GradMonitor()]}, TokenClassifier),
    "EMA": lambda: ({"hooks": [hooks.EMA()]}, TokenClassifier),
    "SWA": lambda: ({"hooks": [hooks.SWA(start=1)]}, TokenClassifier),
    "Unfreeze": lambda: ({"hooks": [hooks.Unfreeze({"2 steps": "head"})]}, TokenClassifier),
    "FindLR": lambda: ({"hooks": [hooks.FindLR()]}, TokenClassifier),
    "adafactor": lambda: ({}, lambda: By("torch.optim.Adafactor")),
    "adagrad": lambda: ({}, lambda: By("torch.optim.Adagrad")),
    "scalar": lambda: ({"strategy": DeepSpeed(stage=3)}, PartFrozen),
    "contradiction": lambda: ({"strategy": DeepSpeed({"gradient_clipping": 1.0})}, TokenClassifier),
}


def refused(what: str) -> tuple[str, str]:
    """Return the class and the message of the error."""
    options, task = REFUSED[what]()
    try:
        quiet(**{"strategy": "deepspeed", "batch_size": 4, "steps": 3, **options}).run(task())
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def by_file(path: Path, **options: Any) -> dict[str, Any]:
    """Train with a configuration file."""
    return jobs.train(DeepSpeed(path), "words", **options)


def fp16(stage: int, place: Path) -> dict[str, Any]:
    """Train in fp16 whole, and stopped and resumed, on a CPU that claims to support fp16."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True
    options = {
        "precision": "fp16",
        "batch_size": 8,
        "epochs": 4,
        "clip_norm": 1.0,
        "resume": "auto",
        "checkpoint": Checkpoint(every="never", background=False),
    }
    try:
        whole = jobs.train(f"zero{stage}", "tiny", run_dir=place / "whole", **options)
        jobs.train(f"zero{stage}", "tiny", run_dir=place / "run", stop_at=5, **options)
        rest = jobs.train(f"zero{stage}", "tiny", run_dir=place / "run", **options)
        weighted = ""
        try:
            jobs.train(f"zero{stage}", "words", **{**options, "resume": None, "checkpoint": False})
        except Exception as error:
            weighted = str(error)
    finally:
        del get_accelerator().is_fp16_supported
    return {
        "same": whole["digest"] == rest["digest"],
        "loss": whole["rows"][-1]["eval/loss"],
        "weighted": weighted,
    }


def afterwards(strategy: str) -> dict[str, Any]:
    """Train, then evaluate and train again with the same objects."""
    task = Tiny(dropout=0.0)
    fit = quiet(strategy=jobs.make(strategy), batch_size=8, epochs=2)
    linear = torch.nn.functional.linear
    told = fit.run(task).metrics["eval/loss"]
    assert torch.nn.functional.linear is linear
    again = fit.evaluate(task)["eval/loss"]
    left = [name for p in task.parameters() for name in vars(p)] + [
        name for m in task.modules() for name in vars(m) if "ds_" in name
    ]
    task(torch.randn(3, 8)).sum().backward()
    grads = [p.grad is not None for p in task.parameters()]
    task.zero_grad()
    more = fit.run(task).metrics["eval/loss"]
    return {"told": told, "again": again, "left": left, "grads": all(grads), "more": more}


def left_partitioned() -> str:
    """Return the error for a task that a failed run has left partitioned."""
    task = Broken(0, "loss")
    for _ in range(2):
        try:
            quiet(strategy=jobs.make("zero3"), batch_size=4, epochs=1).run(task)
        except Exception as error:
            told = str(error)
    return told


def dry_run(strategy: str) -> bool:
    """Return whether a dry run left the weights."""
    task = TokenClassifier()
    before = {name: t.clone() for name, t in task.state_dict().items()}
    quiet(strategy=jobs.make(strategy), batch_size=4, dry_run=True).run(task)
    return all(torch.equal(t, before[name]) for name, t in task.state_dict().items())


def evaluate(strategy: str, checkpoint: Path) -> float:
    """Return the loss with the weights of a checkpoint."""
    return quiet(strategy=jobs.make(strategy), batch_size=4).evaluate(
        TokenClassifier(), checkpoint=checkpoint
    )["eval/loss"]


def equipped(wanted: bool) -> dict[str, Any]:
    """Train with or without compiled blocks (no code generation) and activation checkpointing."""
    more = (
        {
            "compile": Compile(scope="blocks", backend="aot_eager"),
            "activation_checkpointing": "full",
        }
        if wanted
        else {}
    )
    return jobs.train("zero2", "words", batch_size=4, epochs=1, steps=3, eval_every="never", **more)


def held(strategy: str) -> dict[str, Any]:
    """Count the numbers that this rank holds within training."""
    task, found = (
        TokenClassifier(width=32, dropout=0.0),
        {"whole": sum(p.numel() for p in TokenClassifier(width=32).parameters())},
    )
    fit = quiet(strategy=jobs.make(strategy), batch_size=4, steps=3, eval_every="2 steps")

    @fit.on("fit_end")
    def look(run: Any) -> None:
        base = run.strategy._engine.optimizer.optimizer
        found["state"] = sum(
            t.numel()
            for s in base.state.values()
            for t in s.values()
            if torch.is_tensor(t) and t.ndim
        )
        found["parameters"] = sum(p.numel() for p in task.parameters())

    fit.run(task)
    return found
