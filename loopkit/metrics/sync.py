"""Metrics over several ranks: each rank's state put together as if one process had seen all batches
in their order.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loopkit.metrics.accumulator import Gather
from loopkit.nested import map_tensors


def is_torchmetric(metric: Any) -> bool:
    """Whether it is a torchmetrics.Metric, or a collection of them."""
    module = sys.modules.get("torchmetrics")
    return module is not None and isinstance(metric, (module.Metric, module.MetricCollection))


def to_float64(metric: Any) -> None:
    """Have a torchmetrics metric add up in double precision, so that its sums do not depend on
    their order.

    One with a model inside (FID, BERTScore) is left as it is.
    """
    if is_torchmetric(metric) and not any(True for _ in metric.parameters()):
        metric.set_dtype(torch.float64)


class ReplayedMetric:
    """A metric of another kind, whose state cannot be put together: what its updates were given is,
    in their order.

    Nothing is computed before the end, when every rank updates its metric with the batches of all.
    """

    def __init__(self, metric: Any) -> None:
        self.metric = metric
        self._given: list[dict[str, Any]] = []

    def update(self, **given: Any) -> None:
        """Note one batch."""
        self._given.append(map_tensors(lambda tensor: tensor.detach().cpu(), given))

    def compute(self, gather: Gather) -> Any:
        """The metric over all ranks' batches."""
        for given in interleave_ranks(gather(self._given)):
            self.metric.update(**given)
        return self.metric.compute()


def merge(metric: Any, gather: Gather) -> None:
    """Give a torchmetrics metric the state of all ranks'; those inside of a wrapper or a collection
    too.

    As torchmetrics puts states together, but without its assumption that every rank had a batch,
    and with the entries of lists in the order of the data.
    """
    kind = sys.modules["torchmetrics"].Metric
    if isinstance(metric, Mapping) or hasattr(metric, "compute_groups"):
        list(metric.values())  # has those that share a state get one each
    parts = [part for part in metric.modules() if isinstance(part, kind)]
    device = [part.device for part in parts]
    mine = [
        (part._update_count, map_tensors(lambda t: t.detach().cpu(), _state(part)))
        for part in parts
    ]
    gathered = gather(mine)
    for number, part in enumerate(parts):
        counts = [rank[number][0] for rank in gathered]
        states = [rank[number][1] for rank in gathered if rank[number][0]]
        part.sync_on_compute = part._to_sync = False
        if not states:
            continue
        for name, reduce in part._reductions.items():
            value = _together([state[name] for state in states], reduce)
            setattr(part, name, map_tensors(lambda t, to=device[number]: t.to(to), value))  # type: ignore[misc]
        part._update_count, part._computed = sum(counts), None


def _state(metric: Any) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in metric._reductions}


def _together(values: list[Any], reduce: Any) -> Any:
    if isinstance(values[0], list):
        return interleave_ranks(values)
    stacked = torch.stack(
        [value if isinstance(value, Tensor) else torch.as_tensor(value) for value in values]
    )
    return stacked if reduce is None else reduce(stacked)


def interleave_ranks(parts: list[list[Any]]) -> list[Any]:
    """Lists of each rank as one, in the order in which batches are dealt out: the first of each,
    the second …
    """
    rounds = max(map(len, parts), default=0)
    return [part[number] for number in range(rounds) for part in parts if number < len(part)]
