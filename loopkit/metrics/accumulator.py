"""MetricAccumulator: values between two logs, read from the device at once, averaged exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loopkit.errors import TaskError

_CHUNK = 512
Gather = Callable[[Any], list[Any]]
"""Returns the objects of all ranks, given the object of this rank: ``all_gather_object``."""


def _single_rank(value: Any) -> list[Any]:
    return [value]


class MetricAccumulator:
    """Named scalars since the last log. Adding a scalar of an accelerator keeps a reference and reads nothing.

    A scalar in the CPU's memory is read at once, for nothing waits. A tensor that is kept lies between the
    much larger ones of its step: the process would grow with each step until the next log.

    Besides, sums are kept from one evaluation to the next, for ``take_means``.

    ``math.fsum`` sums the values themselves, so an average depends neither on when the values were
    read from the device nor on a checkpoint in between.
    """

    __slots__ = ("_fetched", "_pending", "_sums")

    def __init__(self) -> None:
        # Σ value · weight and Σ weight of what was read since the last take_means
        self._sums: dict[str, tuple[float, float]] = {}
        self._pending: dict[str, tuple[str, list[Any]]] = {}
        self._fetched: dict[str, tuple[str, list[tuple[float, float]]]] = {}

    def add(self, name: str, value: Any, weight: Any = 1, reduce: str = "mean") -> None:
        """Add a scalar: a number, or a detached scalar tensor that nobody changes afterwards.

        Args:
            weight: how much the value counts in a mean.
            reduce: how values become one: "mean", "sum", "max", "min" or "last".
        """
        entry = self._pending.get(name)
        if entry is None:
            entry = self._pending[name] = (reduce, [])
        if type(value) is Tensor:
            value = _read_cpu(value)
        if type(weight) is Tensor:
            weight = _read_cpu(weight)
        entry[1].append((value, weight))

    def absorb(self, other: MetricAccumulator) -> None:
        """Add everything that ``other`` has collected."""
        for name, (reduce, pairs) in other._pending.items():
            for value, weight in pairs:
                self.add(name, value, weight, reduce)

    def forget(self, names: Iterable[str]) -> None:
        """Drop the values of ``names``."""
        for name in names:
            self._pending.pop(name, None)
            self._fetched.pop(name, None)

    def names(self) -> set[str]:
        """Return the names of the values collected since the last log."""
        return {*self._pending, *self._fetched}

    def __len__(self) -> int:
        return len(self._pending) + len(self._fetched)

    def values(self, name: str) -> list[tuple[float, float]]:
        """Return the (value, weight) pairs of ``name`` in order. Reads the device."""
        self._fetch()
        return self._fetched.get(name, ("mean", []))[1]

    def take(self, gather: Gather = _single_rank) -> dict[str, float]:
        """Return the value of each name over all ranks, and forget the values.

        Reads the device once per name. Ranks may have collected different names.

        Raises:
            TaskError: a value is not a number or a scalar tensor.
        """
        gathered = self._gathered(gather)
        self._fetched = {}
        return {name: _reduced(reduce, pairs) for name, (reduce, pairs) in gathered.items()}

    def take_means(self, gather: Gather = _single_rank) -> dict[str, float]:
        """Return the mean of each averaged name since the last call, over all ranks.

        Values that a log took are included, and the next log still gets those that none took.
        Values of a checkpoint are not: after a resume, the means begin at the resume.
        """
        self._fetch()
        pairs: dict[str, list[tuple[float, float]]] = {}
        for part in gather(self._sums):
            for name, (total, weight) in part.items():
                pairs.setdefault(name, []).append((total, weight))
        self._sums = {}
        sums = {
            name: (sum(t for t, _ in each), sum(w for _, w in each)) for name, each in pairs.items()
        }
        return {name: total / weight for name, (total, weight) in sums.items() if weight}

    def newest(self, most: int = 20) -> dict[str, float]:
        """Return the mean of the ``most`` last values of each averaged name since the last log.

        It reads this rank's memory alone: a name whose values are on another device is left out.
        """
        found = {}
        for name, (reduce, pairs) in self._pending.items():
            last = pairs[-most:]
            if reduce == "mean" and not any(
                _elsewhere(value) or _elsewhere(w) for value, w in last
            ):
                total, weight = _sum([(float(value), float(w)) for value, w in last])
                if weight:
                    found[name] = total / weight
        return found

    def _gathered(self, gather: Gather) -> dict[str, Any]:
        self._fetch()
        merged: dict[str, Any] = {}
        for part in gather(self._fetched):
            for name, (reduce, pairs) in part.items():
                merged.setdefault(name, (reduce, []))[1].extend(pairs)
        return merged

    def compact(self) -> None:
        """Read the values from the device if there are many, so that no tensors pile up."""
        if any(len(pairs) >= _CHUNK for _, pairs in self._pending.values()):
            self._fetch()

    def state_dict(self, gather: Gather = _single_rank) -> dict[str, Any]:
        """Return the values of all ranks as plain numbers."""
        return {
            name: [reduce, [list(pair) for pair in pairs]]
            for name, (reduce, pairs) in self._gathered(gather).items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the values by those that ``state_dict`` returned."""
        self._pending = {}
        self._fetched = {
            name: (reduce, [(v, w) for v, w in pairs]) for name, (reduce, pairs) in state.items()
        }

    def _fetch(self) -> None:
        for name, (reduce, pairs) in self._pending.items():
            values = _numbers(name, [value for value, _ in pairs])
            weights = _numbers(f"{name}'s weight", [weight for _, weight in pairs])
            read = list(zip(values, weights))
            self._fetched.setdefault(name, (reduce, []))[1].extend(read)
            if reduce == "mean":
                total, weight = self._sums.get(name, (0.0, 0.0))
                more, its_weight = _sum(read)
                self._sums[name] = (total + more, weight + its_weight)
        self._pending = {}


def _read_cpu(tensor: Tensor) -> Any:
    """Return the number in a scalar tensor of the CPU; another tensor as it is."""
    return tensor.item() if tensor.is_cpu and tensor.numel() == 1 else tensor


def as_float(value: Any) -> float:
    """Return a number as a float; an int that is too large becomes an infinity."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _sum(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return Σ value · weight and Σ weight; a value of weight zero may be NaN."""
    pairs = [(value, weight) for value, weight in pairs if weight]
    return math.fsum(v * w for v, w in pairs), math.fsum(w for _, w in pairs)


def _elsewhere(value: Any) -> bool:
    """Return whether a value is on a device for which the CPU would have to wait, or no scalar."""
    if isinstance(value, Tensor):
        return value.device.type != "cpu" or value.numel() != 1
    return not isinstance(value, (int, float))


def _numbers(name: str, values: list[Any]) -> list[float]:
    tensors = [value for value in values if isinstance(value, Tensor)]
    if not tensors:
        try:
            return [as_float(value) for value in values]
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
        return [as_float(value) for value in values]
    stacked = torch.stack([tensor.detach().reshape(()).to(torch.float64) for tensor in tensors])
    numbers: list[float] = stacked.tolist()
    return numbers


def _reduced(reduce: str, pairs: list[tuple[float, float]]) -> float:
    if reduce == "mean":
        total = math.fsum(weight for _, weight in pairs)
        if not total:
            return math.nan
        # The mean of a micro-batch of weight zero may be NaN.
        return math.fsum(value * weight for value, weight in pairs if weight) / total
    values = [value for value, _ in pairs]
    if reduce == "sum":
        return math.fsum(values)
    if reduce == "last":
        return values[-1]
    return max(values) if reduce == "max" else min(values)
