"""Exact averages of logged values, the metrics of an evaluation over all ranks, and metric objects."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loopkit.foreign_values import missing_attribute

if TYPE_CHECKING:
    from loopkit.metrics.classification import Confidence, PerClassAccuracy
    from loopkit.metrics.rouge import ROUGELsum
    from loopkit.metrics.spans import SpanF1
    from loopkit.metrics.squad import SQuAD

__all__ = ["Confidence", "PerClassAccuracy", "ROUGELsum", "SQuAD", "SpanF1"]

# Each is a torchmetrics.Metric: torchmetrics is imported when one is asked for.
_HOMES = {
    "Confidence": "classification",
    "PerClassAccuracy": "classification",
    "ROUGELsum": "rouge",
    "SQuAD": "squad",
    "SpanF1": "spans",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = globals()[name] = getattr(
            importlib.import_module(f"loopkit.metrics.{_HOMES[name]}"), name
        )
        return value
    raise missing_attribute("loopkit.metrics", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
