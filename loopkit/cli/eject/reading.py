"""How the script reads the training data, as the templates need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, TensorDataset, default_collate

from loopkit.cli.eject.layout import literal
from loopkit.cli.eject.refusals import refuse
from loopkit.data import sampler
from loopkit.data.indexed import IndexedSource
from loopkit.data.loader import Loader
from loopkit.options import Options

_WORKER_DEFAULTS = {
    "prefetch_factor": 2,
    "persistent_workers": False,
    "multiprocessing_context": None,
    "timeout": 0,
    "worker_init_fn": None,
    "pin_memory": "auto",
}


def reading_context(
    source: IndexedSource, data: Any, options: Options, context: dict[str, Any]
) -> dict[str, Any]:
    """Return what the templates need to read the data.

    Args:
        source: the training data as the run reads it.
        data: what ``train_data`` returned.
        context: what is known about ranks and accumulation.

    Raises:
        OptionError: the script cannot read the data in this way.
    """
    loader = source.loader
    described = isinstance(data, (Loader, DataLoader))
    collates = loader.collate_fn not in (None, default_collate)
    columns = type(loader.dataset) is TensorDataset and not collates and not loader.num_workers
    world = " * world" if context["ddp"] else ""
    weights = loader.weights is not None and source.shuffle
    grouped = loader.group_by_length is not False and source.shuffle
    passed = "data" if described else "dataset"
    dataset = "data.dataset" if described else "dataset"
    order = f"order(length, epoch{', weights' if weights else ''})"
    return {
        "columns": columns,
        "source": passed,
        "dataset": dataset,
        "collate": "data.collate_fn" if collates else "default_collate",
        "keys": None if loader.columns is None else literal(list(loader.columns)),
        "workers": loader.num_workers,
        "worker_options": _worker_options(loader),
        "shuffle": source.shuffle,
        "weights": weights,
        "many": source.shuffle and not weights and source.sharding.length >= sampler.MANY,
        "grouped": grouped,
        "lengths": _lengths_key(loader) if grouped else None,
        "given_lengths": grouped and not isinstance(loader.group_by_length, (bool, str)),
        "drop_last": loader.drop_last,
        "order": order,
        "reading": _call(passed, columns, context),
        "batch_size": loader.batch_size or options.batch_size,
        "all_batches": _all_batches(loader, dataset, options, world),
        "length": _length(loader, dataset, options, world),
        "announces": hasattr(loader.dataset, "set_epoch"),
        "world": world,
    }


def _call(passed: str, columns: bool, context: dict[str, Any]) -> list[str]:
    """Return the arguments of ``micro_batches`` in ``main``."""
    skip = f"done * {context['accumulate']}" if context["several"] else "done"
    ranks = ["rank", "world"] if context["ddp"] else []
    return [passed, "indices", skip, *([] if columns else ["epoch"]), *ranks]


def _worker_options(loader: Loader) -> list[str]:
    if not loader.num_workers:
        return []
    found = []
    for name, default in _WORKER_DEFAULTS.items():
        value = getattr(loader, name)
        if name == "worker_init_fn" and value is not None:
            found.append("worker_init_fn=data.worker_init_fn")
        elif value != default:
            if not isinstance(value, (int, float, str)):
                raise refuse(f"Loader({name}={value!r})", "give a plain value")
            found.append(f"{name}={literal(value)}")
    return found


def _lengths_key(loader: Loader) -> str | None:
    wanted = loader.group_by_length
    if isinstance(wanted, Sequence) and not isinstance(wanted, str):
        return None
    return literal("input_ids" if wanted is True else wanted)


def _all_batches(loader: Loader, dataset: str, options: Options, world: str) -> str | None:
    """Return how many batches an epoch has without a limit, where a fraction limits it."""
    if options.overfit is not None or not isinstance(options.limit_train, float):
        return None
    batch = f"(BATCH_SIZE{world})" if world else "BATCH_SIZE"
    return f"math.ceil({_samples(loader, dataset)} / {batch})"


def _samples(loader: Loader, dataset: str) -> str:
    drawn = loader.weights is not None and loader.length is not None
    return repr(loader.length) if drawn else f"len({dataset})"


def _length(loader: Loader, dataset: str, options: Options, world: str) -> str:
    """Return the samples of an epoch as an expression."""
    length = _samples(loader, dataset)
    limit = options.overfit or options.limit_train
    if limit is None:
        return length
    batch = f"BATCH_SIZE{world}"
    count = limit if isinstance(limit, int) else f"max(1, int(batches * {limit!r}))"
    return f"min({length}, {count} * {batch})"
