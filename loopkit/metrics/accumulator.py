"""Values between two logs: collected as they are, read from the device once, averaged exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopkit.errors import TaskError

_CHUNK = 512
Gather = Callable[[Any], list[Any]]


def _alone(value: Any) -> list[Any]:
    return [value]


class MetricAccumulator:
    """Named scalars since the last log. Adding one keeps a reference and costs no device read.

    Sums are taken by ``math.fsum`` over the values themselves, so an average does not depend on
    when values were fetched from the device or whether a checkpoint was saved in between.
    """

    __slots__ = ("_fetched", "_pending")

    def __init__(self) -> None:
        self._pending: dict[str, tuple[str, list[Any]]] = {}
        self._fetched: dict[str, tuple[str, list[tuple[float, float]]]] = {}

    def add(self, name: str, value: Any, weight: Any = 1, reduce: str = "mean") -> None:
        """Note a scalar: a number or a detached scalar tensor, which must not be changed
        afterwards.
        """
        entry = self._pending.get(name)
        if entry is None:
            entry = self._pending[name] = (reduce, [])
        entry[1].append((value, weight))

    def absorb(self, other: MetricAccumulator) -> None:
        """Take in what ``other`` has collected."""
        for name, (reduce, pairs) in other._pending.items():
            for value, weight in pairs:
                self.add(name, value, weight, reduce)

    def __len__(self) -> int:
        return len(self._pending) + len(self._fetched)

    def values(self, name: str) -> list[tuple[float, float]]:
        """The (value, weight) pairs collected under ``name``, in order; reads the device."""
        self._fetch()
        return self._fetched.get(name, ("mean", []))[1]

    def take(self, gather: Gather = _alone) -> dict[str, float]:
        """Each name's value over everything that all ranks collected, and start anew; reads the
        device once per name.

        ``gather`` gives everyone's of one rank's value. Ranks may have collected different names.
        """
        taken = {
            name: _reduced(reduce, pairs)
            for name, (reduce, pairs) in self._everyones(gather).items()
        }
        self._fetched = {}
        return taken

    def _everyones(self, gather: Gather) -> dict[str, Any]:
        self._fetch()
        merged: dict[str, Any] = {}
        for part in gather(self._fetched):
            for name, (reduce, pairs) in part.items():
                merged.setdefault(name, (reduce, []))[1].extend(pairs)
        return merged

    def compact(self) -> None:
        """Fetch what is collected if it has grown long, so that a rare log holds no long list of
        tensors.
        """
        if any(len(pairs) >= _CHUNK for _, pairs in self._pending.values()):
            self._fetch()

    def state_dict(self, gather: Gather = _alone) -> dict[str, Any]:
        """What all ranks collected, as plain numbers."""
        collected = self._everyones(gather).items()
        return {
            name: [reduce, [list(pair) for pair in pairs]] for name, (reduce, pairs) in collected
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self._pending = {}
        self._fetched = {
            name: (reduce, [(v, w) for v, w in pairs]) for name, (reduce, pairs) in state.items()
        }

    def _fetch(self) -> None:
        for name, (reduce, pairs) in self._pending.items():
            values = _numbers(name, [value for value, _ in pairs])
            weights = _numbers(f"{name}'s weight", [weight for _, weight in pairs])
            self._fetched.setdefault(name, (reduce, []))[1].extend(zip(values, weights))
        self._pending = {}


def _numbers(name: str, values: list[Any]) -> list[float]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        try:
            return [float(value) for value in values]
        except (TypeError, ValueError):
            kinds = sorted({type(value).__name__ for value in values})
            raise TaskError(
                f"{name} was logged as {', '.join(kinds)}: log numbers or scalar tensors"
            ) from None
    if any(tensor.numel() != 1 for tensor in tensors):
        shape = next(tuple(t.shape) for t in tensors if t.numel() != 1)
        raise TaskError(
            f"{name} was logged as a tensor of shape {shape}: log a scalar, such as its .mean()"
        )
    if len(tensors) < len(values):
        return [float(value) for value in values]
    stacked = torch.stack([tensor.detach().reshape(()).to(torch.float64) for tensor in tensors])
    numbers: list[float] = stacked.tolist()
    return numbers


def _reduced(reduce: str, pairs: list[tuple[float, float]]) -> float:
    if reduce == "mean":
        total = math.fsum(weight for _, weight in pairs)
        # A micro-batch that counts for nothing may have NaN for its mean.
        return (
            math.fsum(value * weight for value, weight in pairs if weight) / total
            if total
            else math.nan
        )
    values = [value for value, _ in pairs]
    if reduce == "sum":
        return math.fsum(values)
    if reduce == "last":
        return values[-1]
    return max(values) if reduce == "max" else min(values)
