"""Metrics over several ranks, with the result of one process that saw all batches in order."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.metrics.accumulator import Gather
from loopkit.nested import map_tensors, to_cpu


def is_torchmetric(metric: Any) -> bool:
    """Return whether ``metric`` is a torchmetrics Metric or MetricCollection.

    An object of theirs exists only if torchmetrics is imported, so it is not imported here.
    """
    module = sys.modules.get("torchmetrics")
    return module is not None and isinstance(metric, (module.Metric, module.MetricCollection))


def is_mergeable(metric: Any) -> bool:
    """Return whether the states of ranks can be merged into those of one process.

    Those of ``Running`` cannot: it keeps the last updates of its own rank.
    """
    if not is_torchmetric(metric):
        return False
    running = sys.modules["torchmetrics"].wrappers.Running
    return not any(isinstance(part, running) for part in metric.modules())


def is_tracker(metric: Any) -> bool:
    """Return whether ``metric`` is a ``MetricTracker``, a list of one metric per evaluation."""
    return hasattr(metric, "increment") and hasattr(metric, "best_metric")


def start_again(metric: Any, *, kept: bool) -> None:
    """Have a metric forget the last evaluation.

    What a wrapper remembers of earlier evaluations stays: the list of ``MetricTracker``, and the
    bounds of a ``MinMaxMetric`` that the task keeps.

    Args:
        kept: whether the task keeps the metric from one evaluation to the next.
    """
    if is_tracker(metric):
        metric.increment()
    elif kept and hasattr(metric, "min_val") and hasattr(metric, "_base_metric"):
        metric._base_metric.reset()
    else:
        metric.reset()


def to_float64(metric: Any) -> None:
    """Have a torchmetrics metric add in float64, so that its sums do not depend on their order.

    A metric with parameters, such as FID with its network, stays as it is.
    """
    present = metric[-1] if is_tracker(metric) else metric
    if is_torchmetric(present) and not any(True for _ in present.parameters()):
        # A wrapper does not pass it on to the metrics inside.
        for part in _parts(present):
            part.set_dtype(torch.float64)


class ReplayedMetric:
    """Wraps a metric whose states cannot be merged across ranks.

    It stores the arguments of every update, gathers them at the end, and replays the updates of all
    ranks in order, on every rank.
    """

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self._updates: list[tuple[Any, dict[str, Any]]] = []

    def update(self, *positional: Any, **by_name: Any) -> None:
        """Store the arguments of one update."""
        self._updates.append((to_cpu(positional), to_cpu(by_name)))

    def compute(self, gather: Gather) -> Any:
        """Return the metric over the batches of all ranks (collective)."""
        for positional, by_name in interleave_ranks(gather(self._updates)):
            self.metric.update(*positional, **by_name)
        with own_state(self.metric):
            return self.metric.compute()


def merge(metric: Any, gather: Gather) -> None:
    """Give a torchmetrics metric the state of all ranks, the metrics inside of it too (collective).

    States are reduced as torchmetrics does it. But a rank may have had no batch, and the entries of
    lists are in the order of the data.
    """
    unshare_states(metric)
    parts = _parts(metric)
    devices = [part.device for part in parts]
    gathered = gather([(part._update_count, to_cpu(_state(part))) for part in parts])
    for number, (part, device) in enumerate(zip(parts, devices)):
        counts = [rank[number][0] for rank in gathered]
        states = [rank[number][1] for rank in gathered if rank[number][0]]
        if not states:
            continue
        for name, reduce in part._reductions.items():
            value = merged_state([state[name] for state in states], reduce)
            setattr(part, name, map_tensors(partial(Tensor.to, device=device), value))
        part._update_count = sum(counts)
        part._computed = None


@contextmanager
def own_state(metric: Any) -> Iterator[None]:
    """Inside, ``metric.compute()`` takes the states as they are: torchmetrics adds those of no rank."""
    parts = _parts(metric) if "torchmetrics" in sys.modules and hasattr(metric, "modules") else []
    before = [part._to_sync for part in parts]
    for part in parts:
        part._to_sync = False
    try:
        yield
    finally:
        for part, synced in zip(parts, before):
            part._to_sync = synced


def unshare_states(module: nn.Module) -> None:
    """Have the metrics of each collection in ``module`` own a state each, which they may share."""
    collection = sys.modules["torchmetrics"].MetricCollection
    for part in module.modules():
        if isinstance(part, collection):
            list(part.values())  # reading them does it


def _parts(metric: Any) -> list[Any]:
    """Return a torchmetrics metric and the metrics inside of it."""
    kind = sys.modules["torchmetrics"].Metric
    return [part for part in metric.modules() if isinstance(part, kind)]


def _state(metric: Any) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in metric._reductions}


def merged_state(values: list[Any], reduce: Any) -> Any:
    """Return one state of a metric for those of several ranks, reduced as torchmetrics does it."""
    if isinstance(values[0], list):
        return interleave_ranks(values)
    stacked = torch.stack(
        [value if isinstance(value, Tensor) else torch.as_tensor(value) for value in values]
    )
    return stacked if reduce is None else reduce(stacked)


def interleave_ranks(parts: list[list[Any]]) -> list[Any]:
    """Return the lists of all ranks as one, in the order of the data.

    That is the first entry of each rank, then the second of each, and so on.
    """
    longest = max(map(len, parts), default=0)
    return [part[number] for number in range(longest) for part in parts if number < len(part)]
