"""The columns of the data that a transformers model is called with, and their collation."""

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
from loopkit.interop.labels import IGNORED

_SYNONYMS = {"label": "labels", "label_ids": "labels"}


def accepted_columns(model: nn.Module) -> tuple[str, ...]:
    """Return the arguments that the model's ``forward`` names."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(parameter.name for parameter in parameters if parameter.kind in named)


def select_columns(columns: Collection[str], accepted: Collection[str]) -> dict[str, str]:
    """Return the columns that a model accepts, with its name for each: "label" is "labels"."""
    found = {name: name for name in columns if name in accepted}
    for name in columns:
        synonym = _SYNONYMS.get(name, "")
        if name not in found and synonym in accepted and synonym not in found.values():
            found[name] = synonym
    return found


class SelectColumns:
    """A collate function that passes only the accepted columns to another collate function.

    Args:
        accepted: the columns that the model accepts.
        collate_fn: makes a batch of dicts with these columns.
        renames: whether it gets the columns under the model's names. False is for collate functions
            of others: columns keep their names, and samples without any such column stay whole.
    """

    def __init__(
        self,
        accepted: Collection[str],
        collate_fn: Callable[[list[Any]], Any],
        renames: bool = True,
    ) -> None:
        self.accepted = accepted
        self.collate_fn = collate_fn
        self.renames = renames

    def __call__(self, samples: list[Any]) -> Any:
        """Return the batch.

        Raises:
            DataError: the samples are no dicts, or have no column that the model accepts.
        """
        first = samples[0]
        is_dict = isinstance(first, Mapping)
        names = select_columns(list(first), self.accepted) if is_dict else {}
        if not self.renames:
            if not names:
                return self.collate_fn(samples)
            return self.collate_fn([{name: each[name] for name in names} for each in samples])
        if not names:
            what = f"the columns {', '.join(first)}" if is_dict else f"a {type(first).__name__}"
            raise DataError(
                f"a sample has {what}, of which the model takes none: give dicts with some of "
                f"{', '.join(self.accepted)}, or a collate function that makes them"
            )
        return self.collate_fn(
            [{own: sample[name] for name, own in names.items()} for sample in samples]
        )


def drops_columns(collate_fn: Any) -> bool:
    """Return whether a collate function is one of transformers, which fails on columns of text."""
    collate_fn = getattr(collate_fn, "func", collate_fn)  # of a functools.partial
    own = collate_fn if inspect.isfunction(collate_fn) else type(collate_fn)
    kinds = getattr(own, "__mro__", (own,))
    return any(str(kind.__module__).startswith("transformers.data.") for kind in kinds)


def padding_collate(tokenizer: Any, config: Any, labels: Collection[str]) -> Padded:
    """Return a collate function that pads sequences as the tokenizer does, and labels with -100."""
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(config, "pad_token_id", None) if pad is None else pad
    values = {"input_ids": pad or 0, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}
    return Padded(
        {**values, **dict.fromkeys(labels, IGNORED)},
        padding_side=getattr(tokenizer, "padding_side", "right"),
    )


def with_collate(data: Any, collate_fn: Callable[[list[Any]], Any]) -> Any:
    """Return data that a task can return, with ``collate_fn`` unless the data makes batches itself.

    A Dataset, a list, and a Loader over these hold samples. Other iterables hold batches.
    """
    if isinstance(data, Loader):
        data = copy(data)
        data.collate_fn = data.collate_fn or collate_fn
        return data
    holds_samples = isinstance(data, Dataset) or _is_sized(data)
    return Loader(data, collate_fn=collate_fn) if holds_samples else data


def _is_sized(data: Any) -> bool:
    return hasattr(data, "__getitem__") and hasattr(data, "__len__")


def data_sets(data: Any) -> Iterator[Any]:
    """Yield the data itself, or the data sets of a dict; nothing for None."""
    if isinstance(data, Mapping):
        yield from data.values()
    elif data is not None:
        yield data


def column_names(data: Any) -> list[str]:
    """Return the names of a data set's columns, from the data set or from its first sample."""
    data = data.dataset if isinstance(data, Loader) else data
    names = getattr(data, "column_names", None)
    if names is None and _is_sized(data) and len(data):
        # Reading a sample may draw random numbers.
        state = rng.get_state()
        first = data[0]
        rng.set_state(state)
        names = list(first) if isinstance(first, Mapping) else None
    return list(names or ())
