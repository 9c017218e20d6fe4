"""Evaluation: the exact mean loss, metric objects and whole-set metrics of one data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopkit.distributed.communicator import Communicator
from loopkit.distributed.no_collectives import NoCollectives
from loopkit.errors import MetricError, TaskError
from loopkit.metrics.accumulator import Gather, MetricAccumulator, as_float
from loopkit.metrics.class_names import class_names
from loopkit.metrics.inputs import named_metrics
from loopkit.metrics.outputs import BatchOutput, check_outputs, join_outputs, on_cpu
from loopkit.metrics.sync import (
    ReplayedMetric,
    interleave_ranks,
    is_mergeable,
    merge,
    own_state,
    start_again,
    to_float64,
)
from loopkit.nested import named_leaves
from loopkit.task import Task, eval_step_of, name_of, overrides

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

    Attributes:
        class_names: the names of the classes; empty if nobody has them.

    Raises:
        MetricError: ``Task.metrics`` returned something that is not a metric.
    """

    def __init__(self, task: Task, device: torch.device, communicator: Communicator) -> None:
        self._task = task
        self._communicator = communicator
        self._step = f"{name_of(task)}.{eval_step_of(task)}"
        named = list(named_metrics(task.metrics()))
        self.class_names = class_names(task, (metric for _, metric, _ in named))
        self._metrics = [
            (f"{name!r} ({type(metric).__name__})", name, self._prepared(metric, device), inputs)
            for name, metric, inputs in named
        ]
        used = [key for *_, inputs in self._metrics for key in inputs.all_keys]
        self._not_logged = {*_OWN_KEYS, *used}
        self._means = MetricAccumulator()
        self._scalars = MetricAccumulator()
        self._keeps_outputs = overrides(task, "compute_metrics")
        self._outputs: list[BatchOutput] = []
        self._has_loss: bool | None = None

    def _prepared(self, metric: Any, device: torch.device) -> Any:
        metric = metric.to(device) if hasattr(metric, "to") else metric
        start_again(metric, kept=any(part is metric for part in self._task.modules()))
        # MPS has no double precision.
        if device.type != "mps":
            to_float64(metric)
        alone = self._communicator.size == 1
        return metric if alone or is_mergeable(metric) else ReplayedMetric(metric)

    def update(
        self, outputs: Mapping[str, Any], size: int, logged: Sequence[tuple[str, Any, str]] = ()
    ) -> None:
        """Add one batch of ``size`` samples.

        Args:
            outputs: what the step returned.
            logged: what the step logged: names, values and how they are reduced.

        Raises:
            MetricError: a metric asks for an argument that ``outputs`` does not have.
            TaskError: the outputs do not fit those of earlier batches.
        """
        weight = outputs.get("weight", size)
        self._add_loss(outputs, weight)
        for name, value, reduce in logged:
            self._means.add(self._name_in_set(name), _detached(value), size, reduce)
        for key, value in outputs.items():
            if key in self._not_logged:
                continue
            if is_scalar(value):
                self._scalars.add(key, _detached(value), weight)
            else:
                self._not_logged.add(key)
        for who, _, metric, inputs in self._metrics:
            positional, by_name = inputs.of(outputs, who, self._step)
            metric.update(*positional, **by_name)
        if self._keeps_outputs:
            kept = {key: value for key, value in outputs.items() if key not in _OWN_KEYS}
            self._outputs.append(BatchOutput(on_cpu(kept), size))
            rank, ranks = self._communicator.rank, self._communicator.size
            number = rank + (len(self._outputs) - 1) * ranks
            check_outputs(self._outputs[0], self._outputs[-1], (rank, number), self._step)
        self._means.compact()
        self._scalars.compact()

    def _add_loss(self, outputs: Mapping[str, Any], weight: Any) -> None:
        has_loss = "loss" in outputs
        if has_loss:
            self._means.add("loss", _detached(outputs["loss"]), weight)
        if self._has_loss not in (None, has_loss):
            raise TaskError(
                f"{self._step} returned a 'loss' for some batches only, so that there is no mean: "
                "return it for all or none"
            )
        self._has_loss = has_loss

    def _name_in_set(self, name: str) -> str:
        """Return the name of a logged value without that of the set, which is put before it."""
        whole, kind = f"{self._task.eval_set}/", f"{self._task.eval_set.partition('/')[0]}/"
        return name.removeprefix(whole if name.startswith(whole) else kind)

    def _means_of_scalars(self, gather: Gather) -> dict[str, float]:
        """Return the means of the outputs that were scalars in every batch of every rank."""
        shaped = set().union(*gather(self._not_logged))
        means = self._scalars.take(gather)
        return {name: value for name, value in means.items() if name not in shaped}

    def compute(self, prefix: str) -> tuple[dict[str, float], dict[str, Any]]:
        """Return the metrics over all ranks, scalars and arrays, by their names behind ``prefix``.

        Collective: every rank calls it.

        Raises:
            MetricError: ``compute_metrics`` did not return a mapping of numbers and arrays, or
                called a collective.
        """
        gather = self._communicator.all_gather_object
        found: dict[str, Any] = self._means.take(gather) | self._means_of_scalars(gather)
        for _, name, metric, _ in self._metrics:
            if self._communicator.size > 1 and not isinstance(metric, ReplayedMetric):
                merge(metric, gather)
            if isinstance(metric, ReplayedMetric):
                computed = metric.compute(gather)
            else:
                with own_state(metric):
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
        name = f"{name_of(self._task)}.compute_metrics"
        alone = MetricError(
            f"{name} called a collective, but rank 0 computes it alone, with the outputs of all "
            "ranks: give metrics of torchmetrics sync_on_compute=False, or return them from metrics()"
        )
        with NoCollectives(alone) if self._communicator.size > 1 else nullcontext():
            computed = self._task.compute_metrics(EvalOutputs(outputs))
        if not isinstance(computed, Mapping):
            raise MetricError(
                f"{name} returned {type(computed).__name__}: return a dict of names to numbers"
            )
        if "loss" in computed and self._has_loss:
            raise MetricError(
                f"{name} returned a 'loss', and so did {self._step}: give one of them another name"
            )
        found: dict[str, Any] = {}
        for key, value in computed.items():
            if isinstance(value, (str, bytes, type(None))):
                raise MetricError(
                    f"{name} returned {value!r} as {key!r}: give a number or an array, and print "
                    "texts yourself"
                )
            found |= _named_values(value, key)
        return found


def _detached(value: Any) -> Any:
    """Return a value without its graph; of a scalar in the memory of the CPU, the number."""
    if not isinstance(value, Tensor):
        return value
    # A small tensor that stays between large ones that are freed splits the heap: it would grow.
    if value.device.type == "cpu" and value.numel() == 1 and not value.is_complex():
        return value.item()
    return value.detach()


def _named_values(computed: Any, name: str) -> dict[str, Any]:
    """Return computed values by full name: single numbers as floats, others as they are."""
    return {key: _as_number(value) for key, value in named_leaves(computed, name)}


def is_scalar(value: Any) -> bool:
    """Return whether a value that a step returned is a number, which is logged as a mean."""
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex()
    if isinstance(value, np.ndarray):
        return value.ndim == 0 and value.dtype.kind in "biuf"
    return isinstance(value, (int, float, np.number, np.bool_))


def _as_number(value: Any) -> Any:
    if not isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value
    count = value.numel() if isinstance(value, Tensor) else value.size
    return float(value.item()) if count == 1 else value
