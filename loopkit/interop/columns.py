"""Which columns of the data a transformers model is called with, and how samples become its
batches.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from copy import copy
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from loopkit import rng
from loopkit.data import Loader, Padded
from loopkit.errors import DataError

IGNORED = -100
"""The label that a loss leaves out."""

_ALSO_CALLED = {"label": "labels", "label_ids": "labels"}


def accepted_by(model: nn.Module) -> tuple[str, ...]:
    """The arguments that the model's ``forward`` names."""
    named = inspect.signature(model.forward).parameters.values()
    return tuple(p.name for p in named if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def chosen(columns: Collection[str], accepted: Collection[str]) -> dict[str, str]:
    """The columns that a model takes, by its own name of each: a "label" is its "labels"."""
    found = {name: name for name in columns if name in accepted}
    for name in columns:
        own = _ALSO_CALLED.get(name, "")
        if name not in found and own in accepted and own not in found.values():
            found[name] = own
    return found


class Selecting:
    """A collate function that gives ``collate_fn`` only the columns a model takes, under the model's
    names.
    """

    def __init__(self, accepted: Collection[str], collate_fn: Callable[[list[Any]], Any]) -> None:
        self.accepted = accepted
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        """The batch.

        Raises:
            DataError: samples are no dicts, or have nothing that the model takes.
        """
        first = samples[0]
        names = chosen(list(first), self.accepted) if isinstance(first, Mapping) else {}
        if not names:
            what = (
                f"the columns {', '.join(first)}"
                if isinstance(first, Mapping)
                else f"a {type(first).__name__}"
            )
            raise DataError(
                f"a sample has {what}, of which the model takes none: give dicts with some of "
                f"{', '.join(self.accepted)}, or a collate function that makes them"
            )
        return self.collate_fn(
            [{own: sample[name] for name, own in names.items()} for sample in samples]
        )


def padding(tokenizer: Any, config: Any, labels: Collection[str]) -> Padded:
    """How sequences are padded: as the tokenizer says, labels with what losses leave out."""
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    values = {"input_ids": pad or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    return Padded(
        {**values, **dict.fromkeys(labels, IGNORED)},
        padding_side=getattr(tokenizer, "padding_side", "right"),
    )


def opened(data: Any, collate_fn: Callable[[list[Any]], Any]) -> Any:
    """What a task is to return as data: samples are joined by ``collate_fn`` where nothing else is
    there to do it.

    Samples are what a Dataset, a list, or a Loader over these holds; what else can be iterated
    holds batches.
    """
    if isinstance(data, Loader):
        data = copy(data)
        data.collate_fn = data.collate_fn or collate_fn
        return data
    return (
        Loader(data, collate_fn=collate_fn) if isinstance(data, Dataset) or _sized(data) else data
    )


def _sized(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def sets(data: Any) -> Iterator[Any]:
    """The data sets in ``data``: itself, or those of a dict by name."""
    yield from data.values() if isinstance(data, Mapping) else () if data is None else (data,)


def columns_of(data: Any) -> list[str]:
    """The names of the columns of a data set, as far as it tells them, or its first sample does."""
    data = data.dataset if isinstance(data, Loader) else data
    names = getattr(data, "column_names", None)
    if names is None and _sized(data) and len(data):
        streams = rng.get_state()  # a look may draw from them
        first = data[0]
        rng.set_state(streams)
        names = list(first) if isinstance(first, Mapping) else None
    return list(names or ())
