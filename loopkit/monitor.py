"""Monitor: a metric and the direction in which it improves, such as "eval/loss:min".

Best checkpoints, early stopping and plateau schedules compare values by it. A name that begins with
"eval/" is read at every evaluation, any other whenever it is logged. NaN is never better than
another value, and never the best one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from loopkit.checks import shown
from loopkit.errors import MetricError, OptionError, nearest

Mode = Literal["min", "max"]
T = TypeVar("T")
_MODES: dict[str, Mode] = {"min": "min", "max": "max"}


@dataclass(frozen=True)
class Monitor:
    """A metric by its full name, and whether lower ("min") or higher ("max") values are better."""

    name: str
    mode: Mode

    @classmethod
    def parse(cls, text: object, option: str) -> Monitor:
        """Read ``"eval/loss:min"``, as a user gave it for ``option``.

        Raises:
            OptionError: ``text`` is no name with ":min" or ":max" behind it.
        """
        name, _, mode = text.rpartition(":") if isinstance(text, str) else ("", "", "")
        if name and mode in _MODES:
            return cls(name, _MODES[mode])
        raise OptionError(
            f"{shown(option, text)}: give the name of the metric and its mode, "
            "as 'eval/loss:min' or 'eval/accuracy:max'"
        )

    def __str__(self) -> str:
        """Return the form that ``parse`` reads."""
        return f"{self.name}:{self.mode}"

    def value(self, metrics: Mapping[str, float], option: str) -> float:
        """Return the metric's value among those of an evaluation.

        Raises:
            MetricError: the evaluation gave no metric of that name.
        """
        return metric_value(metrics, self.name, shown(option, str(self)))

    def is_better(
        self, value: float, best: float | None, *, min_delta: float = 0.0, threshold: float = 0.0
    ) -> bool:
        """Return whether ``value`` is better than ``best``; any number is better than None.

        Args:
            min_delta: the least difference from ``best`` that counts.
            threshold: the least difference that counts, as a fraction of ``best``.
        """
        if math.isnan(value):
            return False
        if best is None:
            return True
        if self.mode == "min":
            return best * (1 - threshold) - value > min_delta
        return value - best * (1 + threshold) > min_delta

    def ranked(self, items: Iterable[T], metrics: Callable[[T], Mapping[str, object]]) -> list[T]:
        """Return the items that have the metric as a number, the best first, equal ones in order.

        Args:
            metrics: gives the metrics of an item.
        """
        scored: list[tuple[float, T]] = []
        for item in items:
            value = metrics(item).get(self.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                scored.append((value if self.mode == "min" else -value, item))
        scored = [pair for pair in scored if not math.isnan(pair[0])]
        return [item for _, item in sorted(scored, key=lambda pair: pair[0])]


def is_of_evaluation(name: str) -> bool:
    """Return whether every evaluation must give the metric called ``name``; else a log may."""
    return name.startswith("eval/")


def metric_value(metrics: Mapping[str, float], name: str, asked_by: str) -> float:
    """Return the value of the metric called ``name``.

    Args:
        asked_by: the option that names the metric, for the message.

    Raises:
        MetricError: the evaluation gave no metric of that name.
    """
    if name not in metrics:
        raise MetricError(
            f"{asked_by}: the evaluation gave no {name!r}.{nearest(name, metrics)} "
            f"It gave {', '.join(sorted(metrics))}"
        )
    return metrics[name]
