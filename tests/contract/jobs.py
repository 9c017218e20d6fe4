"""Jobs for any strategy, which every rank runs alike: train, evaluate, predict, resume."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torchmetrics
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from loopkit import Checkpoint, Loader
from loopkit.errors import LoopkitWarning
from loopkit.strategies.dtensor import full_tensor
from tests.contract.tasks import TASKS, Own
from tests.metric_tasks import Wrapped
from tests.support import Recorder, Tiny, digest, quiet

# Plans that split the layers of the tests' tasks over ranks.
WORDS = {"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}
WHOLE_WORDS = {**WORDS, "embed": "colwise_rep", "head": "rowwise_rep"}
STOPPED = Checkpoint(every="1000 steps", background=False)
TINY = {"net.0": "colwise", "net.3": "rowwise"}


def make(strategy: Any) -> Any:
    """Return the strategy for its name in a test, or for (class, settings).

    "zero2" is DeepSpeed's stage 2. "tensor" splits the blocks of TokenClassifier over two ranks,
    "tensor-tiny" the layers of Tiny.
    """
    import loopkit

    if isinstance(strategy, str) and strategy.startswith("tensor"):
        return loopkit.TensorParallel(TINY if strategy == "tensor-tiny" else WORDS, size=2)
    if isinstance(strategy, str) and strategy.startswith("zero"):
        # By default stage 3 keeps parameters of fewer than 100 000 elements whole. Here those are all
        # parameters.
        config = (
            {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
            if strategy == "zero3"
            else None
        )
        return loopkit.DeepSpeed(config, stage=int(strategy[-1]))

    if isinstance(strategy, tuple):
        return getattr(loopkit, strategy[0])(**strategy[1])
    return strategy


def train(
    strategy: Any,
    task: str = "tiny",
    task_args: dict[str, Any] | None = None,
    stop_at: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train; return all that must be the same, from weights and losses to the result."""
    made, recorder, found = TASKS[task](**(task_args or {})), Recorder(), {}
    options = {"hooks": [recorder], **options}
    fit = quiet(strategy=make(strategy), **options)
    if stop_at is not None:
        fit.on(
            "step_end", lambda run, out: run.stop("test") if run.progress.step == stop_at else None
        )

    def state(run: Any) -> dict[str, Any]:
        tensors, plain = run.strategy.optimizer_state()
        model = gathered(run, run.strategy.model_state())
        return {"model": model, "optimizer": gathered(run, tensors), "plain": repr(plain)}

    @fit.on("load")
    def keep_loaded(run: Any, path: Path) -> None:
        found["loaded"] = state(run)

    @fit.on("fit_end")
    def keep(run: Any) -> None:
        found.update(state(run))
        found["progress"] = {k: v for k, v in run.progress.state_dict().items() if k != "seconds"}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopkitWarning)
        result = fit.run(made)
    timed = ("eval/runtime", "eval/samples_per_second")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in result.history]
    found["digest"] = digest(found["model"]) + digest(found["optimizer"])
    found["left"] = digest({name: full_tensor(t) for name, t in made.state_dict().items()})
    return {
        **found,
        "losses": recorder.losses,
        "rows": rows,
        "status": result.status,
        "why": result.reason,
        "step": result.step,
        "checkpoint": result.checkpoint,
        "names": list(made.state_dict()),
        "best": result.best,
    }


def gathered(run: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return whole copies; of tensors that are whole on rank 0 alone, the copies of rank 0."""
    copies = {name: full_tensor(t).detach().clone() for name, t in tensors.items()}
    given = run.strategy.world.broadcast_object(
        {name: t for name, t in copies.items() if not t.is_meta}
    )
    return {name: given[name] if t.is_meta else t for name, t in copies.items()}


def evaluate(
    strategy: Any, task: str, task_args: dict[str, Any] | None = None, **options: Any
) -> dict[str, float]:
    """Evaluate an untrained task."""
    torch.manual_seed(0)
    return quiet(strategy=make(strategy), **options).evaluate(TASKS[task](**(task_args or {})))


def wrapped(strategy: Any, *calls: tuple[int, int, bool]) -> list[dict[str, float]]:
    """Measure by every wrapper of torchmetrics.

    Args:
        calls: for each, the number of samples, the size of a batch, and whether it is a test.
    """
    found = []
    for count, batch_size, tests in calls:
        task, fit = Wrapped(count), quiet(strategy=make(strategy), batch_size=batch_size)
        found.append(fit.test(task, task.eval_data()) if tests else fit.evaluate(task))
    return found


class Kept(Tiny):
    """Keeps metrics over the training epoch; an evaluation measures by one of them too."""

    def __init__(self) -> None:
        super().__init__(count=37, dropout=0.0)
        self.accuracy = MulticlassAccuracy(3, average="micro")
        self.seen, self.curve = torchmetrics.SumMetric(), MulticlassAUROC(3)
        self.epochs: list[list[float]] = []

    def train_step(self, batch: Any) -> Any:
        logits = self.net(batch[0])
        if self.training:
            self.accuracy.update(logits, batch[1])
            self.curve.update(logits.detach().softmax(-1), batch[1])
            self.seen.update(len(batch[0]))
        return torch.nn.functional.cross_entropy(logits, batch[1])

    def eval_step(self, batch: Any) -> dict[str, Any]:
        return {"loss": self.train_step(batch), "value": batch[0]}

    def on_epoch_end(self, run: Any) -> None:
        kept = (self.accuracy, self.curve, self.seen)
        self.epochs.append([float(metric.compute()) for metric in kept])
        for metric in kept:
            metric.reset()


class KeptUneven(Kept):
    """The same on data of which each rank has its own number of batches."""

    def train_data(self) -> Any:
        return Loader(Own(37), sharded=True)


def kept_uneven(strategy: Any) -> list[float]:
    """Return how many samples each epoch's metric has seen, on all ranks together."""
    task = KeptUneven()
    quiet(strategy=make(strategy), steps=300, epochs=3, batch_size=4, eval_every="never").run(task)
    return [values[2] for values in task.epochs]


def kept(strategy: Any, folder: str, stop: int | None = None, **options: Any) -> list[list[float]]:
    """Train with metrics over the epoch; stop after a step, or resume; return their values."""
    task = Kept()
    fit = quiet(
        strategy=make(strategy), run_dir=folder, resume="auto", checkpoint=True, epochs=3, **options
    )
    if stop is not None:
        fit.on("step_end", lambda run, out: run.stop("x") if run.progress.step == stop else None)
    fit.run(task)
    return task.epochs


def predict(
    strategy: Any,
    task: str,
    task_args: dict[str, Any] | None = None,
    writer: bool = False,
    **options: Any,
) -> Any:
    """Predict with an untrained task; with a writer, return what the writer got."""
    torch.manual_seed(0)
    written: list[Any] = []
    made = TASKS[task](**(task_args or {}))
    returned = quiet(strategy=make(strategy), **options).predict(
        made, writer=written.append if writer else None
    )
    return written if writer else returned


def resume_everywhere(
    strategy: Any, place: Path, stops: Iterable[int], **options: Any
) -> list[str]:
    """Train whole, then resume from each of ``stops``; return what differs.

    The first resume is of a run that was stopped there, the others of what the whole run has saved.
    """
    saves = {"checkpoint": Checkpoint(every="1 step", keep=None, background=False)}
    whole = train(strategy, run_dir=place / "whole", **options, **saves)
    wrong = []
    for number, stop in enumerate(stops):
        if number == 0:
            source = place / str(stop)
            train(strategy, run_dir=source, stop_at=stop, **options, checkpoint=STOPPED)
        else:
            source = place / "whole" / "checkpoints" / f"step-{stop:012d}"
        rest = train(
            strategy, run_dir=place / f"after-{stop}", resume=source, checkpoint=STOPPED, **options
        )
        for what, same in (
            ("losses", rest["losses"] == whole["losses"][stop:]),
            ("state", rest["digest"] == whole["digest"] and rest["plain"] == whole["plain"]),
            ("progress", rest["progress"] == whole["progress"]),
            ("rows", rest["rows"] == [row for row in whole["rows"] if row["step"] > stop]),
        ):
            if not same:
                wrong.append(f"{what} after a stop at step {stop}")
    return wrong
