"""Prediction over many samples: samples per second.

    python benchmarks/prediction.py                    # two minutes

Every contestant gives the class of each sample, by the model and the data of ``evaluation.py``, as
one tensor. They take turns in one process with one torch thread.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import record
from benchmarks.evaluation import BATCH, PACKAGES, Model, Samples
from benchmarks.overhead import quiet
from benchmarks.peers import plain_trainer
from benchmarks.throughput import BASE
from loopkit import Fit, Task


def by_hand(model: Model, data: Samples) -> Tensor:
    """Run a loop around torch's DataLoader."""
    with torch.no_grad():
        return torch.cat([model.net(x).argmax(1) for x, _ in DataLoader(data, BATCH)])


class Classifier(Task):
    """The job as a Task."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: Any) -> Tensor:
        return self.model.net(batch[0]).argmax(1)


def loopkit(model: Model, data: Samples) -> Tensor:
    """Run Fit.predict."""
    return Fit(eval_batch_size=BATCH, progress=False, loggers=None).predict(Classifier(model), data)


def lightning(model: Model, data: Samples) -> Tensor:
    """Run Lightning's Trainer.predict."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def predict_step(self, batch: Any, index: int) -> Tensor:
            return self.model.net(batch[0]).argmax(1)

    found: Any = plain_trainer().predict(Module(), DataLoader(data, BATCH))
    return torch.cat(found)


def transformers(model: Model, data: Samples) -> Tensor:
    """Run Trainer.predict, which gets the classes from the model."""
    from transformers import Trainer, TrainingArguments

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"classes": self.model.net(x).argmax(1)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, per_device_eval_batch_size=BATCH, use_cpu=True, report_to=[],
            disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = Trainer(
            Outer(), arguments,
            data_collator=lambda samples: {"x": torch.stack([x for x, _ in samples])},
        )  # fmt: skip
        return torch.as_tensor(trainer.predict(data).predictions)  # type: ignore[arg-type]


CONTESTANTS: dict[str, Callable[[Model, Samples], Tensor]] = {
    BASE: by_hand,
    "loopkit": loopkit,
    "lightning": lightning,
    "transformers": transformers,
}


def once(name: str, count: int) -> tuple[float, Tensor]:
    """Return the samples per second of one prediction, and the classes."""
    model, data = Model(), Samples(count)
    gc.collect()
    began = perf_counter()
    with quiet():
        classes = CONTESTANTS[name](model, data)
    return count / (perf_counter() - began), classes


def measure(rounds: int, count: int) -> dict[str, dict[str, Any]]:
    """Return speed and ratio to the loop by hand, by contestant.

    Raises:
        RuntimeError: a contestant predicts other classes than the loop by hand.
    """
    found: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for number in range(-1, rounds):  # the first round imports and warms up
        size = count if number >= 0 else 5 * BATCH
        wanted = once(BASE, size)[1]
        for name, speeds in found.items():
            speed, classes = once(name, size)
            if not torch.equal(classes, wanted):
                raise RuntimeError(f"{name} predicts other classes than the loop by hand")
            if number >= 0:
                speeds.append(speed)
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr)
    return record.compared(found, BASE, "speed")


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description="Prediction over many samples, side by side.")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=100_000, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows = measure(args.rounds, args.samples)
    print(f"\n{'':14}{'samples/s':>12}{'ratio':>8}")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["ratio"]["median"]):
        print(f"{name:14}{row['speed']['median']:12.0f}{row['ratio']['median']:8.2f}")
    about = {"rounds": args.rounds, "samples": args.samples}
    record.save("prediction", {**about, "versions": record.versions(PACKAGES), "rows": rows})


if __name__ == "__main__":
    main()
