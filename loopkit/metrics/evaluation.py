"""Evaluation: what one pass over a data set measures: the exact mean loss, metric objects,
whole-set metrics.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from loopkit.errors import MetricError
from loopkit.metrics.accumulator import MetricAccumulator
from loopkit.metrics.sync import ReplayedMetric, interleave_ranks, is_torchmetric, merge, to_float64
from loopkit.nested import map_tensors
from loopkit.task import Task, name_of, overrides

if TYPE_CHECKING:
    from loopkit.distributed.communicator import Communicator

PADDING = -100
_OWN_KEYS = ("loss", "weight")


@dataclass
class EvalOutputs:
    """Everything ``eval_step`` returned over a data set, in its order, as NumPy arrays where they
    were tensors.

    Batches whose shapes differ beyond the first dimension are padded with -100 to the largest.
    Unpacks as ``preds, target``; other keys are attributes.

    Attributes:
        preds, target: under those keys of ``eval_step``'s mapping, [samples, ...].
        inputs, losses: likewise, where ``eval_step`` returns them.
    """

    values: dict[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("values", {})
        if name in values:
            return values[name]
        raise AttributeError(
            f"eval_step returned no {name!r}: it returned {', '.join(values) or 'nothing'}"
        )

    def __iter__(self) -> Any:
        return iter((self.preds, self.target))


class Evaluation:
    """Accumulates one pass over one data set, of which each rank sees its share.

    Args:
        communicator: over the ranks that evaluate together. ``compute`` calls its collectives.
    """

    def __init__(self, task: Task, device: torch.device, communicator: Communicator) -> None:
        self._task = task
        self._communicator = communicator
        self._metrics = [
            (name, self._prepared(metric, device), _wanted(name, metric))
            for name, metric in _flat(task.metrics(), "")
        ]
        self._means = MetricAccumulator()
        self._whole = overrides(task, "compute_metrics")
        self._kept: dict[str, list[Any]] = {}

    def _prepared(self, metric: Any, device: torch.device) -> Any:
        metric = metric.to(device) if hasattr(metric, "to") else metric
        if is_torchmetric(metric):
            if device.type != "mps":  # which has no double precision
                to_float64(metric)
            return metric
        return ReplayedMetric(metric) if self._communicator.size > 1 else metric

    def update(
        self, outputs: Mapping[str, Any], size: int, logged: Sequence[tuple[str, Any, str]] = ()
    ) -> None:
        """Take in one batch of ``size`` samples: ``eval_step``'s outputs and what it logged.

        Raises:
            MetricError: a metric asks for an argument that the outputs lack.
        """
        if "loss" in outputs:
            loss = outputs["loss"]
            self._means.add(
                "loss",
                loss.detach() if isinstance(loss, Tensor) else loss,
                outputs.get("weight", size),
            )
        for name, value, reduce in logged:
            self._means.add(
                name, value.detach() if isinstance(value, Tensor) else value, size, reduce
            )
        for name, metric, (needed, optional) in self._metrics:
            missing = [argument for argument in needed if argument not in outputs]
            if missing:
                kind = type(
                    metric.metric if isinstance(metric, ReplayedMetric) else metric
                ).__name__
                raise MetricError(
                    f"the metric {name!r} ({kind}) asks for {missing[0]!r}, and "
                    f"{name_of(self._task)}.eval_step returned {', '.join(map(repr, outputs))}: "
                    f"return it under that name"
                )
            metric.update(**{k: outputs[k] for k in (*needed, *optional) if k in outputs})
        if self._whole:
            for key, value in outputs.items():
                if key not in _OWN_KEYS:
                    self._kept.setdefault(key, []).append(
                        map_tensors(lambda t: t.detach().cpu(), value)
                    )
        self._means.compact()

    def compute(self, prefix: str) -> tuple[dict[str, float], dict[str, Any]]:
        """The metrics under ``prefix``: (scalars, arrays).

        Raises:
            MetricError: ``compute_metrics`` returned no mapping.
        """
        gather = self._communicator.all_gather_object
        found: dict[str, Any] = dict(self._means.take(gather))
        for name, metric, _ in self._metrics:
            if self._communicator.size > 1 and is_torchmetric(metric):
                merge(metric, gather)
            computed = (
                metric.compute(gather) if isinstance(metric, ReplayedMetric) else metric.compute()
            )
            found |= dict(_flat_values(computed, name))
        if self._whole:
            gathered = self._communicator.gather_object(self._kept)
            found |= self._communicator.run_on_rank_zero(lambda: self._of_the_whole(gathered))
        scalars, arrays = {}, {}
        for name, value in found.items():
            if isinstance(value, (int, float)):
                scalars[prefix + name] = float(value)
            else:
                arrays[prefix + name] = value
        return scalars, arrays

    def _of_the_whole(self, gathered: list[dict[str, list[Any]]]) -> dict[str, Any]:
        keys = dict.fromkeys(key for kept in gathered for key in kept)
        kept = {key: interleave_ranks([part.get(key, []) for part in gathered]) for key in keys}
        computed = self._task.compute_metrics(
            EvalOutputs({key: joined(parts) for key, parts in kept.items()})
        )
        if not isinstance(computed, Mapping):
            raise MetricError(
                f"{name_of(self._task)}.compute_metrics returned {type(computed).__name__}: "
                "return a dict of names to numbers"
            )
        return {
            key: value
            for name, given in computed.items()
            for key, value in _flat_values(given, name)
        }


def _flat(metrics: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, metric in metrics.items():
        if all(
            callable(getattr(metric, method, None)) for method in ("update", "compute", "reset")
        ):
            flat.append((prefix + name, metric))
        elif isinstance(metric, Mapping):
            flat += _flat(metric, f"{prefix}{name}/")
        else:
            raise MetricError(
                f"metrics()[{prefix + name!r}] is a {type(metric).__name__}: give an object with "
                f"update, "
                "compute and reset, such as a torchmetrics.Metric; for a function of the whole "
                "evaluation, define compute_metrics(self, outputs)"
            )
    return flat


def _wanted(name: str, metric: Any) -> tuple[list[str], list[str]]:
    """The names of the arguments that ``metric.update`` needs, and of those it may take."""
    parts: list[Any] = [metric]
    if isinstance(metric, Mapping) or hasattr(
        metric, "compute_groups"
    ):  # a collection passes each its own
        parts = list(metric.values())
    needed: dict[str, None] = {}
    optional: dict[str, None] = {}
    for part in parts:
        for parameter in inspect.signature(part.update).parameters.values():
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            (needed if parameter.default is parameter.empty else optional)[parameter.name] = None
    if not needed and not optional:
        raise MetricError(
            f"the metric {name!r} ({type(metric).__name__}) does not say what its update takes: "
            "give it named arguments"
        )
    return list(needed), list(optional)


def _flat_values(value: Any, name: str) -> list[tuple[str, Any]]:
    """A computed value by full name: numbers as floats, others as they are."""
    if isinstance(value, Mapping):
        return [pair for key, part in value.items() for pair in _flat_values(part, f"{name}/{key}")]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        single = value.numel() == 1 if isinstance(value, Tensor) else value.size == 1
        return [(name, float(value.item()) if single else value)]
    return [(name, value)]


def joined(parts: list[Any]) -> Any:
    """Batches' outputs as one, NumPy arrays for tensors; trailing shapes that differ are padded
    with -100.
    """
    first = parts[0]
    if isinstance(first, Tensor):
        tensors = [part if part.ndim else part.reshape(1) for part in parts]
        tensors = [t.float() if t.dtype in (torch.bfloat16, torch.float16) else t for t in tensors]
        ndim = tensors[0].ndim
        largest = [max(t.shape[axis] for t in tensors) for axis in range(1, ndim)]
        return np.concatenate([_padded(t, largest) for t in tensors])
    if isinstance(first, Mapping):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        return tuple(joined(list(column)) for column in zip(*parts))
    if isinstance(first, list):
        return [item for part in parts for item in part]
    return parts


def _padded(tensor: Tensor, largest: list[int]) -> Any:
    array = tensor.numpy()
    widths = [(0, 0)] + [(0, most - size) for most, size in zip(largest, array.shape[1:])]
    if not any(after for _, after in widths):
        return array
    return np.pad(array, widths, constant_values=PADDING if array.dtype != bool else False)
