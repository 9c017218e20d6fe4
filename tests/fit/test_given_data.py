"""Data given to evaluate and predict is put together as the task's own data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from loopkit import Loader, Task
from loopkit.data import Padded
from tests.support import quiet

ROWS = [{"input_ids": [2] + [5] * n + [3], "y": float(n)} for n in range(1, 9)]


class Rows(Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Any:
        return {**ROWS[index], "extra": object()}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(ROWS)


class Pads(Task):
    """Pads in the Loader of one of its data methods."""

    def __init__(self, where: str, make: Any = Loader) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        own = make(ROWS, collate_fn=Padded())
        setattr(self, where, lambda: own)

    def eval_step(self, batch: Any) -> Any:
        return {"loss": (self.weight * batch["attention_mask"].sum(1).float()).mean()}

    def predict_step(self, batch: Any) -> Any:
        return batch["attention_mask"].sum(1)


DATA = {
    "dataset": Rows,
    "stream": Stream,
    "list": lambda: ROWS,
    "loader": lambda: Loader(ROWS, batch_size=3),
    "own columns": lambda: Loader(Rows(), columns=["input_ids"]),
}


@pytest.mark.parametrize("where", ["eval_data", "predict_data", "train_data"])
@pytest.mark.parametrize("data", DATA)
def test_samples_get_the_collate_function_of_the_tasks_loader(data, where):
    task = Pads(where)
    if data == "dataset":
        own = Loader(ROWS, collate_fn=Padded(), columns=["input_ids"])
        setattr(task, where, lambda: {"a": own} if where == "eval_data" else own)
    predicted = quiet(eval_batch_size=4).predict(task, data=DATA[data]())
    assert predicted.tolist() == [n + 2 for n in range(1, 9)]
    if where != "predict_data":
        metrics = quiet(eval_batch_size=4).evaluate(task, data={"x": DATA[data]()})
        assert metrics["eval/x/loss"] == pytest.approx(6.5)


def test_a_dataloader_of_the_task_is_looked_at_too():
    predicted = quiet(eval_batch_size=4).predict(Pads("train_data", DataLoader), data=Stream())
    assert len(predicted) == 8


def test_data_with_a_collate_function_of_its_own_and_batches_keep_theirs():
    def ones(samples: list[Any]) -> Any:
        return {"attention_mask": torch.ones(len(samples), 1, dtype=torch.long)}

    task = Pads("eval_data")
    for data in (Loader(ROWS, 4, collate_fn=ones), DataLoader(ROWS, 4, collate_fn=ones)):
        assert quiet().predict(task, data=data).tolist() == [1] * 8
    batches = (Padded()(ROWS[:2]), Padded()(ROWS[2:]))
    assert len(quiet().predict(task, data=batches)) == 8
