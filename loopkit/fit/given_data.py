"""Data that is given to evaluate and predict: its samples are put together as the task's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from loopkit.data import Loader
from loopkit.data.sources import is_map_style
from loopkit.task import Task, overrides


def like_data_of(task: Task, method: str, data: Any) -> Any:
    """Return ``data`` with the collate function and the columns of the task's own Loader.

    The Loader is that of ``method``, else of the evaluation data, else of the training data. Only
    samples get it: a Loader without a collate function, and a Dataset, or a list where the task's
    Loader reads a list. A Loader or DataLoader that has its own, and batches, stay as they are.

    Args:
        task: the task.
        method: "eval_data", "test_data" or "predict_data".
        data: the data, or a dict of several sets.
    """
    if isinstance(data, Mapping):
        return {name: like_data_of(task, method, part) for name, part in data.items()}
    if isinstance(data, Loader):
        wants = data.collate_fn is None
    else:
        wants = is_map_style(data) or type(data) is list
    if not wants:
        return data
    own = next(_loaders(task, method), None)
    if own is None or (type(data) is list and type(own.dataset) is not list):
        return data
    made = copy.copy(data) if isinstance(data, Loader) else Loader(data)
    made.collate_fn = own.collate_fn
    made.columns = getattr(own, "columns", None) if made.columns is None else made.columns
    return made


def _loaders(task: Task, method: str) -> Iterator[Any]:
    """Yield the Loaders and DataLoaders of the task's own data, those of ``method`` first."""
    for name in dict.fromkeys((method, "eval_data", "train_data")):
        if not overrides(task, name):
            continue
        data = getattr(task, name)()
        for part in data.values() if isinstance(data, Mapping) else [data]:
            if isinstance(part, (Loader, DataLoader)):
                yield part
