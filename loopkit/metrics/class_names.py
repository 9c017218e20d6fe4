"""The names of classes: those that a task, its model or a metric has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def class_names(task: Any, metrics: Iterable[Any] = ()) -> list[str]:
    """Return the names of the classes 0, 1, …; empty if nobody has them.

    The first of these that has them counts: the attribute ``class_names`` of the task, ``id2label``
    of the configuration of its ``model``, and the attribute ``labels`` of a metric.
    """
    config = getattr(getattr(task, "model", None), "config", None)
    known = (
        getattr(task, "class_names", None),
        getattr(config, "id2label", None),
        *(getattr(metric, "labels", None) for metric in metrics),
    )
    return next(filter(None, map(_names, known)), [])


def _names(given: Any) -> list[str]:
    if not given or isinstance(given, str) or not isinstance(given, (Sequence, Mapping)):
        return []
    try:
        names = names_by_id(given)
    except (TypeError, ValueError):
        return []
    # transformers' own names for classes that nobody has named.
    unnamed = all(name == f"LABEL_{number}" for number, name in enumerate(names))
    return [] if unnamed or not all(isinstance(name, str) for name in names) else names


def names_by_id(labels: Sequence[str] | Mapping[int, str]) -> list[str]:
    """Return the names of the ids 0, 1, …, of which JSON may have made strings.

    Raises:
        ValueError: a mapping leaves out an id.
    """
    if not isinstance(labels, Mapping):
        return list(labels)
    named = {int(number): name for number, name in labels.items()}
    if sorted(named) != list(range(len(named))):
        raise ValueError(f"labels name the ids {sorted(named)}: give every id from 0 on a name")
    return [named[number] for number in range(len(named))]
