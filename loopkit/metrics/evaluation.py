"""Evaluation: the exact mean loss, metric objects and whole-set metrics of one data set."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopkit.distributed.communicator import Communicator
from loopkit.errors import MetricError
from loopkit.metrics.accumulator import MetricAccumulator, as_float
from loopkit.metrics.outputs import BatchOutput, check_outputs, join_outputs, on_cpu
from loopkit.metrics.sync import ReplayedMetric, interleave_ranks, is_torchmetric, merge, to_float64
from loopkit.nested import named_leaves
from loopkit.task import Task, name_of, overrides

_OWN_KEYS = ("loss", "weight")


@dataclass
class EvalOutputs:
    """What ``eval_step`` returned over a whole data set, in the order of its samples.

    Tensors are NumPy arrays, [samples, ...]. ``loopkit.metrics.outputs.join_outputs`` says how
    batches are joined. Each key is an attribute; ``preds, target = outputs`` unpacks the two.

    Attributes:
        values: the outputs by their key.
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
    """Accumulates the metrics of one data set, of which each rank has its share of the batches.

    Args:
        task: gives the metrics.
        device: where the metrics keep their state.
        communicator: over the ranks that evaluate together. ``compute`` calls its collectives.

    Raises:
        MetricError: ``Task.metrics`` returned something that is not a metric.
    """

    def __init__(self, task: Task, device: torch.device, communicator: Communicator) -> None:
        self._task = task
        self._communicator = communicator
        self._metrics = [
            (name, self._prepared(metric, device), _update_arguments(name, metric))
            for name, metric in _named_metrics(task.metrics())
        ]
        self._means = MetricAccumulator()
        self._keeps_outputs = overrides(task, "compute_metrics")
        self._outputs: list[BatchOutput] = []
        self._step = f"{name_of(task)}.eval_step"

    def _prepared(self, metric: Any, device: torch.device) -> Any:
        metric = metric.to(device) if hasattr(metric, "to") else metric
        if is_torchmetric(metric):
            # MPS has no double precision.
            if device.type != "mps":
                to_float64(metric)
            return metric
        return ReplayedMetric(metric) if self._communicator.size > 1 else metric

    def update(
        self, outputs: Mapping[str, Any], size: int, logged: Sequence[tuple[str, Any, str]] = ()
    ) -> None:
        """Add one batch of ``size`` samples.

        Args:
            outputs: what ``eval_step`` returned.
            logged: what the step logged: names, values and how they are reduced.

        Raises:
            MetricError: a metric asks for an argument that ``outputs`` does not have.
        """
        if "loss" in outputs:
            self._means.add("loss", _detached(outputs["loss"]), outputs.get("weight", size))
        for name, value, reduce in logged:
            self._means.add(name, _detached(value), size, reduce)
        for name, metric, (needed, optional) in self._metrics:
            missing = [argument for argument in needed if argument not in outputs]
            if missing:
                wrapped = metric.metric if isinstance(metric, ReplayedMetric) else metric
                raise MetricError(
                    f"the metric {name!r} ({type(wrapped).__name__}) asks for {missing[0]!r}, but "
                    f"{name_of(self._task)}.eval_step returned {', '.join(map(repr, outputs))}: "
                    "return it under that name"
                )
            metric.update(**{k: outputs[k] for k in (*needed, *optional) if k in outputs})
        if self._keeps_outputs:
            kept = {key: value for key, value in outputs.items() if key not in _OWN_KEYS}
            self._outputs.append(BatchOutput(on_cpu(kept), size))
            rank, ranks = self._communicator.rank, self._communicator.size
            number = rank + (len(self._outputs) - 1) * ranks
            check_outputs(self._outputs[0], self._outputs[-1], (rank, number), self._step)
        self._means.compact()

    def compute(self, prefix: str) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the metrics over all ranks, scalars and arrays, by their names behind ``prefix``.

        Collective: every rank calls it.

        Raises:
            MetricError: ``compute_metrics`` did not return a mapping.
        """
        gather = self._communicator.all_gather_object
        found: dict[str, Any] = dict(self._means.take(gather))
        for name, metric, _ in self._metrics:
            if self._communicator.size > 1 and is_torchmetric(metric):
                merge(metric, gather)
            if isinstance(metric, ReplayedMetric):
                computed = metric.compute(gather)
            else:
                computed = metric.compute()
            found |= _named_values(computed, name)
        if self._keeps_outputs:
            gathered = self._communicator.gather_object(self._outputs)
            found |= self._communicator.run_on_rank_zero(lambda: self._whole_set(gathered))
        scalars: dict[str, float] = {}
        arrays: dict[str, Any] = {}
        for name, value in found.items():
            if isinstance(value, (int, float)):
                scalars[prefix + name] = as_float(value)
            else:
                arrays[prefix + name] = value
        return scalars, arrays

    def _whole_set(self, gathered: list[list[BatchOutput]]) -> dict[str, Any]:
        """Return what ``compute_metrics`` makes of the outputs of all ranks."""
        outputs = join_outputs(interleave_ranks(gathered), self._step, arrays=True) or {}
        computed = self._task.compute_metrics(EvalOutputs(outputs))
        if not isinstance(computed, Mapping):
            raise MetricError(
                f"{name_of(self._task)}.compute_metrics returned {type(computed).__name__}: "
                "return a dict of names to numbers"
            )
        found: dict[str, Any] = {}
        for name, value in computed.items():
            found |= _named_values(value, name)
        return found


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _named_metrics(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the metrics of nested dicts with their keys, joined by "/"."""
    named: list[tuple[str, Any]] = []
    for name, metric in metrics.items():
        methods = (getattr(metric, method, None) for method in ("update", "compute", "reset"))
        # A MetricCollection is a mapping as well.
        if all(map(callable, methods)):
            named.append((prefix + name, metric))
        elif isinstance(metric, Mapping):
            named += _named_metrics(metric, f"{prefix}{name}/")
        else:
            raise MetricError(
                f"metrics()[{prefix + name!r}] is a {type(metric).__name__}: give an object with "
                "update, compute and reset, such as a torchmetrics.Metric; for a function of the "
                "whole evaluation, define compute_metrics(self, outputs)"
            )
    return named


def _update_arguments(name: str, metric: Any) -> tuple[list[str], list[str]]:
    """Return the names of the arguments that ``metric.update`` needs, and of those it may take."""
    parts: list[Any] = [metric]
    if isinstance(metric, Mapping) or hasattr(metric, "compute_groups"):
        # A collection gives each of its metrics the arguments that this one takes.
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


def _named_values(computed: Any, name: str) -> dict[str, Any]:
    """Return computed values by full name: single numbers as floats, others as they are."""
    return {key: _as_number(value) for key, value in named_leaves(computed, name)}


def _as_number(value: Any) -> Any:
    if not isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value
    count = value.numel() if isinstance(value, Tensor) else value.size
    return float(value.item()) if count == 1 else value
