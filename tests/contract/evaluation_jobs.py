"""A search for cases in which evaluation or prediction does not see each sample once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.data import TensorDataset

from loopkit import Fit, Task
from loopkit.errors import DataError


class Counting(Task):
    """A task that only notes which samples it got."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(1, 1)
        self.seen: list[int] = []

    def eval_step(self, batch: Any) -> dict[str, Any]:
        return {"loss": batch[0].double().mean(), "ids": batch[0]}

    def predict_step(self, batch: Any) -> torch.Tensor:
        return batch[0]

    def compute_metrics(self, outputs: Any) -> dict[str, float]:
        self.seen = outputs.ids.tolist()
        return {}


def sweep(counts: Iterable[int], sizes: Iterable[int]) -> list[str]:
    """Return the cases in which a sample was missed, seen twice or out of order."""
    wrong, task = [], Counting()
    for count in counts:
        data = TensorDataset(torch.arange(count))
        for size in sizes:
            fit = Fit(strategy="ddp", batch_size=size, progress=False)
            task.seen = []
            try:
                metrics = fit.evaluate(task, data)
                predicted = fit.predict(task, data).tolist()
            except DataError:
                if count:
                    wrong.append(f"{count} samples in batches of {size} are refused")
                continue
            seen = of_rank_zero(task.seen)
            if seen != list(range(count)) or predicted != seen or count == 0:
                wrong.append(
                    f"{count} samples in batches of {size}: scored {seen}, predicted {predicted}"
                )
            if abs(metrics["eval/loss"] - (count - 1) / 2) > 1e-12:
                wrong.append(
                    f"{count} samples in batches of {size}: the mean is {metrics['eval/loss']}"
                )
    return wrong


class Nested(Counting):
    """A task whose outputs are nested, ragged, and have a tuple of entries by sample."""

    def eval_step(self, batch: Any) -> dict[str, Any]:
        ids = batch[0]
        images, targets = tuple(zip(*[(torch.ones(int(i) % 3), {"id": int(i)}) for i in ids]))
        return {
            "images": images,
            "target": targets,
            "words": [f"word {int(i)}" for i in ids],
            "mask": ids[:, None].expand(-1, int(ids[-1]) + 1).to(torch.uint8),
            "pair": (ids.numpy(), {"squeezed": ids[:, None].squeeze()}),
        }

    def predict_step(self, batch: Any) -> Any:
        return self.eval_step(batch)

    def compute_metrics(self, outputs: Any) -> dict[str, float]:
        self.seen = outputs.values
        return {}


def nested(count: int, size: int) -> list[str]:
    """Return what evaluation and prediction give for nested outputs that is not as wanted."""
    task, data = Nested(), TensorDataset(torch.arange(count))
    fit = Fit(strategy="ddp", batch_size=size, progress=False)
    fit.evaluate(task, data)
    wrong, ids = [], list(range(count))
    for what, found in (
        ("scored", of_rank_zero(task.seen)),
        ("predicted", fit.predict(task, data)),
    ):
        checks = {
            "images": [len(image) for image in found["images"]] == [i % 3 for i in ids],
            "target": [target["id"] for target in found["target"]] == ids,
            "words": found["words"] == [f"word {i}" for i in ids],
            "mask": tuple(found["mask"].shape) == (count, count)
            and found["mask"][0].tolist() == [0] * min(size, count) + [-100] * (count - size),
            "pair": found["pair"][0].tolist() == ids,
            "squeezed": found["pair"][1]["squeezed"].tolist() == ids,
        }
        wrong += [f"{what} {name}: {found}" for name, right in checks.items() if not right]
    return wrong


def of_rank_zero(value: Any) -> Any:
    """Return the value of rank 0."""
    from loopkit.distributed.communicator import Communicator, ProcessGroupCommunicator

    world = ProcessGroupCommunicator() if torch.distributed.is_initialized() else Communicator()
    return world.broadcast_object(value)
