"""The short class that stands for HFTask in the script, written for one model and its batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopkit.cli.eject.layout import fold, literal
from loopkit.cli.eject.refusals import refuse
from loopkit.cli.eject.script import render
from loopkit.data import Padded
from loopkit.interop.columns import SelectColumns, select_columns
from loopkit.interop.huggingface import HFTask
from loopkit.task import name_of


def hf_task_text(task: HFTask, samples: Any, batch: Any) -> str:
    """Return the class that stands for ``HFTask``.

    Args:
        task: the task, after its first step.
        samples: the data set that it reads.
        batch: its first batch.

    Raises:
        OptionError: the task uses more of HFTask than the script can hold.
    """
    name = name_of(task)
    adapters = bool(task.state_dict_names.adapters)
    if not adapters and not task.state_dict().keys() <= task.model.state_dict().keys():
        raise refuse(f"{name}, which has weights beside its model", "derive it from Task")
    if not isinstance(batch, Mapping):
        raise refuse(f"{name} with batches that are no dicts", "derive it from Task")
    collate: Any = task._collate
    own = not (isinstance(collate, SelectColumns) and isinstance(collate.collate_fn, Padded))
    drops = own and isinstance(collate, SelectColumns)
    first = samples[0]
    columns: Any = select_columns(list(first), task._columns) if isinstance(first, Mapping) else {}
    labels = [each for each in task._labels.names if each in batch]
    weight = task.weight(batch)
    counted = f'batch["{labels[0]}"]' if labels else ""
    if task._labels.shifts and labels and batch[labels[0]].ndim > 1:
        counted += "[..., 1:]"
    context = {
        "adapters": adapters,
        "own_collate": own,
        "own_loss": task._loss_fn is not None,
        "columns": _folded(columns) if not own else (_listed("columns", columns) if drops else ""),
        "padding": "" if own else _padding(collate.collate_fn, columns.values()),
        "weight": None if weight is None else counted,
        "ignored": task._labels._ignored,
        "cast": _cast(task, batch, labels),
        "names": _listed("names", [each for each in batch if each in task._columns]),
        "constants": [f"{key}={value!r}" for key, value in task._constants.items()],
    }
    return render("hf_task", context)


def _folded(columns: Mapping[str, str]) -> str:
    pairs = [f"{literal(name)}: {literal(own)}" for name, own in columns.items()]
    return fold(8, "columns = {", pairs, "}")[len("columns = ") :]


def _listed(variable: str, names: Iterable[str]) -> str:
    """Return the tuple of the names, as it is assigned to the variable in a method."""
    shown = [literal(name) for name in names]
    head = f"{variable} = ("
    return f"({shown[0]},)" if len(shown) == 1 else fold(8, head, shown, ")")[len(head) - 1 :]


def _padding(padded: Padded, columns: Any) -> str:
    values = {name: value for name, value in padded.values.items() if name in columns and value}
    shown = [literal(values)] if values else []
    if padded.padding_side != "right":
        shown.append(f"padding_side={literal(padded.padding_side)}")
    return ", ".join(shown)


def _cast(task: HFTask, batch: Mapping[str, Any], labels: list[str]) -> str:
    """Return the entries of a batch whose labels need another dtype."""
    casts = []
    for name in labels:
        value = batch[name]
        if isinstance(value, Tensor) and not value.is_floating_point():
            wanted = torch.float32 if task._labels._are_values(value) else torch.int64
            if value.dtype != wanted:
                casts.append(f'"{name}": batch["{name}"].to({wanted})')
    return ", ".join(casts)
