"""Evaluation over many samples and 1,000 classes: samples per second, and memory as samples grow.

    python benchmarks/evaluation.py                    # five minutes

Every contestant gives the accuracy and the mean loss of the same model on the same data. Speed is
measured in turns in one process with one torch thread. Memory is how much more a fresh process
takes for 1,000,000 samples than for 100,000, without the data, which makes samples as they are read.
"""

from __future__ import annotations

import argparse
import gc
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks import record
from benchmarks.overhead import quiet
from benchmarks.peers import plain_trainer
from benchmarks.throughput import BASE, own_peak
from loopkit import Fit, Task

CLASSES, WIDTH, BATCH = 1000, 16, 500
SIZES = (100_000, 1_000_000)
PACKAGES = ("torch", "loopkit-torch", "torchmetrics", "lightning", "transformers")


class Samples(Dataset[tuple[Tensor, Tensor]]):
    """``count`` samples, of which 1,000 differ."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.count = count
        self.x = torch.randn(1000, WIDTH, generator=draw)
        self.y = torch.randint(0, CLASSES, (1000,), generator=draw)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index % 1000], self.y[index % 1000]


class Model(nn.Module):
    """A linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(WIDTH, CLASSES)


def by_hand(model: Model, data: Samples) -> tuple[float, float]:
    """Run a loop around torch's DataLoader, with sums as tensors."""
    right, loss = torch.zeros(()), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for x, y in DataLoader(data, BATCH):
            logits = model.net(x)
            loss += F.cross_entropy(logits, y, reduction="sum")
            right += (logits.argmax(1) == y).sum()
    return float(right) / len(data), float(loss) / len(data)


class Classifier(Task):
    """The job as a Task."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def eval_step(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits = self.model.net(x)
        return {"loss": F.cross_entropy(logits, y), "preds": logits, "target": y}

    def metrics(self) -> Any:
        from torchmetrics.classification import MulticlassAccuracy

        return {"accuracy": MulticlassAccuracy(CLASSES, average="micro")}


def loopkit(model: Model, data: Samples) -> tuple[float, float]:
    """Run Fit.evaluate."""
    fit = Fit(eval_batch_size=BATCH, progress=False, loggers=None)
    found = fit.evaluate(Classifier(model), data)
    return found["eval/accuracy"], found["eval/loss"]


def lightning(model: Model, data: Samples) -> tuple[float, float]:
    """Run Lightning's Trainer.validate with torchmetrics."""
    import lightning.pytorch as pl
    from torchmetrics.classification import MulticlassAccuracy

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.accuracy = MulticlassAccuracy(CLASSES, average="micro")

        def validation_step(self, batch: Any, index: int) -> None:
            x, y = batch
            logits = self.model.net(x)
            self.accuracy.update(logits, y)
            self.log("loss", F.cross_entropy(logits, y))
            self.log("accuracy", self.accuracy)

    found = plain_trainer().validate(Module(), DataLoader(data, BATCH), verbose=False)[0]
    return found["accuracy"], found["loss"]


def transformers(model: Model, data: Samples) -> tuple[float, float]:
    """Run Trainer.evaluate, which keeps the class of each sample and not its logits."""
    from transformers import Trainer, TrainingArguments

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            logits = self.model.net(x)
            return {"loss": F.cross_entropy(logits, labels), "logits": logits}

    def collate(items: list[Any]) -> dict[str, Tensor]:
        return {
            "x": torch.stack([x for x, _ in items]),
            "labels": torch.stack([y for _, y in items]),
        }

    def accuracy(found: Any) -> dict[str, float]:
        return {"accuracy": float((found.predictions == found.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_eval_batch_size=BATCH, use_cpu=True, report_to=[],
            disable_tqdm=True, remove_unused_columns=False, label_names=["labels"],
        )  # fmt: skip
        trainer = Trainer(
            Outer(), arguments, data_collator=collate, eval_dataset=data,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )  # fmt: skip
        found = trainer.evaluate()
    return found["eval_accuracy"], found["eval_loss"]


CONTESTANTS: dict[str, Callable[[Model, Samples], tuple[float, float]]] = {
    BASE: by_hand,
    "loopkit": loopkit,
    "lightning": lightning,
    "transformers": transformers,
}


def once(name: str, count: int) -> tuple[float, tuple[float, float]]:
    """Return the samples per second of one evaluation, and its two metrics."""
    model, data = Model(), Samples(count)
    gc.collect()
    began = perf_counter()
    with quiet():
        metrics = CONTESTANTS[name](model, data)
    return count / (perf_counter() - began), metrics


def growth(name: str) -> float:
    """Return how many more MB a fresh process takes for ten times as many samples."""
    found = []
    for size in SIZES:
        words = [sys.executable, __file__, "--memory", name, "--samples", str(size)]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        found.append(float(done.stdout.splitlines()[-1]))
    return found[1] - found[0]


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Evaluation over many samples, side by side.")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=SIZES[0], help="(default: %(default)s)")
    parser.add_argument("--memory", choices=CONTESTANTS, help="run once, and print the peak, MB")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if args.memory:
        once(args.memory, args.samples)
        print(own_peak())
        return
    found: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    wanted: tuple[float, float] | None = None
    for number in range(-1, args.rounds):  # the first round imports and warms up
        for name, speeds in found.items():
            speed, metrics = once(name, args.samples if number >= 0 else 5 * BATCH)
            if number >= 0:
                wanted = wanted or metrics
                if max(abs(a - b) for a, b in zip(metrics, wanted)) > 1e-4:
                    raise RuntimeError(f"{name} gives {metrics}, and by hand it is {wanted}")
                speeds.append(speed)
        print(f"\rround {number + 1} of {args.rounds}", end="", file=sys.stderr)
    rows = record.compared(found, BASE, "speed")
    for name, row in rows.items():
        row["growth"] = growth(name)
    print(f"\n{'':14}{'samples/s':>12}{'ratio':>8}{'MB for 900,000 more':>22}")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["ratio"]["median"]):
        speed, ratio = row["speed"]["median"], row["ratio"]["median"]
        print(f"{name:14}{speed:12.0f}{ratio:8.2f}{row['growth']:22.0f}")
    about = {"rounds": args.rounds, "samples": args.samples, "sizes": SIZES, "classes": CLASSES}
    record.save("evaluation", {**about, "versions": record.versions(PACKAGES), "rows": rows})


if __name__ == "__main__":
    main()
