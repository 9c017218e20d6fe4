"""Exact averages of logged values, the metrics of an evaluation over all ranks, and metric objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.lazy import lazy_names

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

__getattr__, __dir__ = lazy_names("loopkit.metrics", _HOMES)
