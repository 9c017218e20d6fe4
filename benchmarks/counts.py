"""The cost of a step by the number of parameters and of hooks, and of a batch by the number of metrics.

    python benchmarks/counts.py                        # six minutes

The contestants take turns in one process with one torch thread. A hook counts the steps, and a
metric is an F-score of torchmetrics. By hand, hooks are functions that the loop calls.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from benchmarks import by_hand, ours, peers, record
from benchmarks.job import Job, Model
from benchmarks.overhead import quiet
from loopkit import Fit, Task

BASE = "by hand"
TRAIN: dict[str, Callable[[Job], None]] = {
    BASE: by_hand.best,
    "loopkit": ours.loopkit,
    "lightning": peers.lightning,
    "transformers": peers.transformers,
}
PARAMETERS, HOOKS, METRICS = (10, 100, 1_000, 10_000), (0, 1, 10, 100), (1, 10, 30)
CLASSES, BATCHES = 10, 100
PACKAGES = ("torch", "loopkit-torch", "lightning", "transformers", "torchmetrics")


class Parts(Model):
    """A model of ``count`` parameters of 8 numbers, which one call puts together."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential()
        self.parts = nn.ParameterList([torch.randn(8) for _ in range(count)])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.stamps.append(perf_counter())
        return torch.cat(tuple(self.parts)).square().mean() * x.mean()


def step(name: str, steps: int, *, parameters: int | None = None, hooks: int = 0) -> float:
    """Return the µs per step of one run: the median, the first tenth left out."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(steps, False, Path(folder), hooks=hooks)
        if parameters is not None:
            job.model = Parts(parameters)
        gc.collect()
        with quiet():
            TRAIN[name](job)
    stamps = job.model.stamps[steps // 10 :]
    if len(job.model.stamps) != steps or job.called != hooks * steps:
        raise RuntimeError(f"{name}: {len(job.model.stamps)} steps, {job.called} calls of hooks")
    return median((b - a) * 1e6 for a, b in pairwise(stamps))


def scores(count: int) -> dict[str, Any]:
    """Return ``count`` F-scores."""
    from torchmetrics.classification import MulticlassFBetaScore

    return {f"f{n}": MulticlassFBetaScore(1.0 + n / 10, CLASSES) for n in range(count)}


def evaluated_by_hand(net: nn.Module, data: list[Any], count: int) -> dict[str, float]:
    """Run a loop around torchmetrics' MetricCollection."""
    from torchmetrics import MetricCollection

    metrics = MetricCollection(scores(count))
    with torch.no_grad():
        for x, y in data:
            metrics.update(net(x), y)
    return {name: float(value) for name, value in metrics.compute().items()}


def evaluated_by_loopkit(net: nn.Module, data: list[Any], count: int) -> dict[str, float]:
    """Run Fit.evaluate, with the metrics in a MetricCollection too."""
    from torchmetrics import MetricCollection

    class Classifier(Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def eval_step(self, batch: Any) -> dict[str, Tensor]:
            x, y = batch
            return {"preds": self.net(x), "target": y}

        def metrics(self) -> Any:
            return {"of": MetricCollection(scores(count))}

    found = Fit(progress=False, loggers=None).evaluate(Classifier(), data)
    return {name.removeprefix("eval/of/"): value for name, value in found.items()}


def evaluated_by_lightning(net: nn.Module, data: list[Any], count: int) -> dict[str, float]:
    """Run Trainer.validate with torchmetrics' MetricCollection."""
    import lightning.pytorch as pl
    from torchmetrics import MetricCollection

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.metrics = MetricCollection(scores(count))

        def validation_step(self, batch: Any, index: int) -> None:
            x, y = batch
            self.metrics.update(self.net(x), y)
            self.log_dict(self.metrics)

    found = peers.plain_trainer().validate(Module(), peers.PreparedBatches(data), verbose=False)
    return dict(found[0])


EVALUATE: dict[str, Callable[[nn.Module, list[Any], int], dict[str, float]]] = {
    BASE: evaluated_by_hand,
    "loopkit": evaluated_by_loopkit,
    "lightning": evaluated_by_lightning,
}


def batch(name: str, count: int, batches: int, wanted: dict[int, dict[str, float]]) -> float:
    """Return the µs per batch of one evaluation, from its start to its end.

    Args:
        wanted: the scores of the contestant that came first, by their number, to compare with.

    Raises:
        RuntimeError: the scores are others.
    """
    torch.manual_seed(0)
    net = nn.Linear(16, CLASSES)
    data = [(torch.randn(32, 16), torch.randint(0, CLASSES, (32,))) for _ in range(batches)]
    gc.collect()
    began = perf_counter()
    with quiet():
        found = EVALUATE[name](net, data, count)
    taken = (perf_counter() - began) / batches * 1e6
    first = wanted.setdefault(count, found)
    if any(abs(value - found[key]) > 1e-5 for key, value in first.items()):
        raise RuntimeError(f"{name} gives {found}, and the first one gave {first}")
    return taken


def measure(rounds: int) -> dict[str, dict[int, dict[str, Any]]]:
    """Return µs and the ratio to the loop by hand, by what is counted, its number and contestant."""
    wanted: dict[int, dict[str, float]] = {}
    kinds: dict[str, tuple[tuple[int, ...], Any, Callable[[str, int], float]]] = {
        "parameters": (PARAMETERS, TRAIN, lambda name, n: step(
            name, 200 if n < 1_000 else 40, parameters=n)),
        "hooks": (HOOKS, TRAIN, lambda name, n: step(name, 300, hooks=n)),
        "metrics": (METRICS, EVALUATE, lambda name, n: batch(name, n, BATCHES, wanted)),
    }  # fmt: skip
    result: dict[str, dict[int, dict[str, Any]]] = {}
    for kind, (numbers, contestants, once) in kinds.items():
        for name in contestants:  # imports and warms up
            once(name, numbers[0])
        for number in numbers:
            found: dict[str, list[float]] = {name: [] for name in contestants}
            for turn in range(rounds):
                for name in record.rotated(found, turn):
                    found[name].append(once(name, number))
            result.setdefault(kind, {})[number] = record.compared(found, BASE, "time")
            print(f"\r{kind}: {number}     ", end="", file=sys.stderr, flush=True)
    return result


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="What a step costs by number, side by side.")
    parser.add_argument("--rounds", type=int, default=9, help="runs of each (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    found = measure(args.rounds)
    print()
    for kind, numbers in found.items():
        for number, rows in numbers.items():
            print(f"\n{number:,} {kind}")
            for name, row in rows.items():
                time, over, ratio = (row[key]["median"] for key in ("time", "over", "ratio"))
                print(f"{name:14}{time:12.0f} µs{over:+12.0f}{ratio:8.2f}")
    about = {"rounds": args.rounds, "versions": record.versions(PACKAGES)}
    record.save("counts", {**about, "kinds": found})


if __name__ == "__main__":
    main()
