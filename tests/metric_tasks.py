"""A task with every wrapper of torchmetrics, whose metrics the tests compute by hand or on ranks."""

from __future__ import annotations

from typing import Any

import torch
import torchmetrics
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from loopkit import Task
from loopkit.optim import SGD


def accuracy(**options: Any) -> Any:
    return MulticlassAccuracy(3, average="micro", **options)


def scores(count: int, seed: int = 1) -> TensorDataset:
    """Logits [count, 3], classes [count], and values [count]."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, 3, generator=generator)
    target = (logits + torch.randn(count, 3, generator=generator)).argmax(1)
    return TensorDataset(logits, target, torch.rand(count, generator=generator))


def wrappers() -> dict[str, Any]:
    """Every wrapper and composition, by name."""
    from torchmetrics import wrappers as wrapped

    return {
        "classwise": wrapped.ClasswiseWrapper(MulticlassAccuracy(3, average=None)),
        "minmax": wrapped.MinMaxMetric(accuracy()),
        "bootstrap": wrapped.BootStrapper(accuracy(), num_bootstraps=4),
        "running": wrapped.Running(torchmetrics.MeanMetric(), window=3),
        "running sum": (wrapped.Running(torchmetrics.SumMetric(), window=3), "value"),
        "tracked sum": (wrapped.MetricTracker(torchmetrics.SumMetric(), maximize=True), "value"),
        "tracker": wrapped.MetricTracker(accuracy()),
        "transformed": wrapped.LambdaInputTransformer(accuracy(), lambda preds: -preds),
        "sum": accuracy() + MulticlassF1Score(3),
        "mixed": accuracy() + torchmetrics.MeanMetric(),
        "scaled": 2 * accuracy(),
        "minmax of a sum": wrapped.MinMaxMetric(accuracy() * 2),
        "group": torchmetrics.MetricCollection(
            {
                "a": accuracy(),
                "b": torchmetrics.MetricCollection({"c": accuracy(), "d": MulticlassF1Score(3)}),
                "e": wrapped.LambdaInputTransformer(accuracy(), lambda preds: -preds),
            }
        ),
        "outputs": (
            wrapped.MultioutputWrapper(torchmetrics.MeanSquaredError(), num_outputs=2),
            "pairs/left",
            "pairs/right",
        ),
        "tasks": wrapped.MultitaskWrapper({"x": accuracy(), "y": torchmetrics.MeanSquaredError()}),
    }


class Wrapped(Task):
    """Measures given logits by every wrapper."""

    def __init__(self, count: int = 23) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.count = count

    def train_step(self, batch: Any) -> Any:
        return self.net(batch[2][:, None]).square().mean()

    def eval_step(self, batch: Any) -> dict[str, Any]:
        logits, target, value = batch
        pairs = torch.stack([value, value * 2], 1)
        self.log("logged", value.mean())
        return {
            "preds": logits,
            "target": target,
            "value": value,
            "weight": value.sum(),
            "kld": value.mean(),
            "pairs": {"left": pairs, "right": pairs + 1},
            "task_preds": {"x": logits, "y": value},
            "task_targets": {"x": target, "y": value + 2},
        }

    def metrics(self) -> dict[str, Any]:
        return wrappers()

    def optimizers(self) -> Any:
        return SGD(lr=0.1)

    def train_data(self) -> Any:
        return scores(8)

    def eval_data(self) -> Any:
        return scores(self.count)
