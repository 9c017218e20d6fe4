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


def of_rank_zero(value: Any) -> Any:
    """Return the value of rank 0."""
    from loopkit.distributed.communicator import Communicator, ProcessGroupCommunicator

    world = ProcessGroupCommunicator() if torch.distributed.is_initialized() else Communicator()
    return world.broadcast_object(value)
