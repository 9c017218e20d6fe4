"""States of the torchmetrics objects that a task keeps as attributes, saved and resumed with a run."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from loopkit.errors import LoopkitWarning
from loopkit.metrics.accumulator import Gather
from loopkit.metrics.sync import is_tracker, merged_state, unshare_states
from loopkit.nested import map_tensors, to_cpu

# What torchmetrics changes in an update beside the states that a metric declares.
_COUNTERS = ("_update_count", "_num_vals_seen", "min_val", "max_val")


def kept_metrics(task: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the torchmetrics objects among the modules of ``task`` with their names.

    An object of theirs exists only if torchmetrics is imported, so it is not imported here.
    """
    library = sys.modules.get("torchmetrics")
    if library is not None:
        for name, part in task.named_modules():
            if isinstance(part, library.Metric):
                yield name, part


def kept_state(task: nn.Module, gather: Gather) -> dict[str, Any]:
    """Return the states of the metrics that ``task`` keeps, of every rank (collective)."""
    metrics = list(kept_metrics(task))
    if not metrics:
        return {}
    unshare_states(task)
    own = {name: _state_of(metric) for name, metric in metrics}
    trackers = {name: part.n_steps for name, part in task.named_modules() if is_tracker(part)}
    return {"trackers": trackers, "ranks": gather(own)}


def load_kept_state(
    task: nn.Module, saved: Mapping[str, Any], rank: int, ranks: int, where: object = ""
) -> None:
    """Give the metrics that ``task`` keeps the states that ``kept_state`` returned.

    On as many ranks as saved them, each gets its own. On another number, rank 0 gets the state of
    all, where the states of ranks can be merged.
    """
    for name, part in task.named_modules():
        while is_tracker(part) and part.n_steps < saved.get("trackers", {}).get(name, 0):
            part.increment()
    each = saved.get("ranks", [])
    for name, metric in kept_metrics(task):
        states = [state[name] for state in each if name in state]
        if not states:
            metric.reset()
        elif len(each) == ranks:
            _load(metric, each[rank].get(name))
        elif all(reduce in _addable() for reduce in metric._reductions.values()):
            _load(metric, _merge(metric, states) if rank == 0 else None)
        else:
            metric.reset()
            warnings.warn(
                f"{where} was saved by {len(each)} ranks and {ranks} resume: the metric {name} "
                f"({type(metric).__name__}) starts again, since its states cannot be merged",
                LoopkitWarning,
                stacklevel=2,
            )


@contextmanager
def preserved_metrics(task: nn.Module) -> Iterator[None]:
    """Inside, updates of the metrics that ``task`` keeps do not last."""
    undo = metrics_snapshot(task)
    try:
        yield
    finally:
        undo()


def metrics_snapshot(task: nn.Module) -> Callable[[], None]:
    """Return a function that gives the metrics that ``task`` keeps the states of now back.

    The copies stay on the metrics' devices. Of a list of tensors only the list is copied, because
    an update appends to it.
    """
    saved = []
    for _, metric in kept_metrics(task):
        state = _live_state(metric)
        copies = {
            name: value.clone() if isinstance(value, Tensor) else copy.copy(value)
            for name, value in state["states"].items()
        }
        saved.append((metric, {**state, "states": copies}))

    def undo() -> None:
        for metric, state in saved:
            _load(metric, state)

    return undo


def without_updates(task: nn.Module, step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``step`` for a dummy batch, which is in no metric."""

    def call(batch: Any) -> Any:
        with preserved_metrics(task):
            return step(batch)

    return call


def _state_of(metric: Any) -> dict[str, Any]:
    return to_cpu(_live_state(metric))  # type: ignore[no-any-return]


def _live_state(metric: Any) -> dict[str, Any]:
    states = {name: getattr(metric, name) for name in metric._defaults}
    counters = {name: getattr(metric, name) for name in _COUNTERS if hasattr(metric, name)}
    return {"states": states, "counters": counters}


def _load(metric: Any, saved: Mapping[str, Any] | None) -> None:
    metric.reset()
    if saved is None:
        return
    move = partial(map_tensors, partial(Tensor.to, device=metric.device))
    for name, value in {**saved["states"], **saved["counters"]}.items():
        setattr(metric, name, move(value))
    metric._computed = None


def _merge(metric: Any, states: list[Any]) -> dict[str, Any]:
    columns = {
        name: merged_state([state["states"][name] for state in states], reduce)
        for name, reduce in metric._reductions.items()
    }
    counters = [state["counters"] for state in states]
    first = dict(counters[0], _update_count=sum(each["_update_count"] for each in counters))
    return {"states": columns, "counters": first}


def _addable() -> tuple[Any, ...]:
    """Return torchmetrics' reductions that give the same, whatever the shares of the ranks are."""
    data = sys.modules["torchmetrics"].utilities.data
    return (data.dim_zero_sum, data.dim_zero_cat, data.dim_zero_max, data.dim_zero_min)
