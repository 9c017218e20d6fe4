"""Metrics of a classifier that torchmetrics has not: confidence, and accuracy under class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from loopkit.metrics.class_names import names_by_id


class Confidence(Metric):
    """The mean confidence of right predictions, of wrong ones and of all.

    The confidence is the probability of the predicted class. ``update(preds, target)`` takes scores
    [..., classes] and class ids [...]. With ties, the first class counts as predicted.

    ``compute()`` gives "right", "wrong" and "all", each from 0 to 1, and nan for one that has no
    predictions.

    Args:
        logits: whether scores are logits, of which softmax makes probabilities. False: probabilities.
        ignore_index: the target of entries that do not count.

    Raises:
        ValueError: from ``update``, if the shapes do not fit.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, logits: bool = True, ignore_index: int = -100, **options: Any) -> None:
        super().__init__(**options)
        self.logits = logits
        self.ignore_index = ignore_index
        self.add_state("sums", torch.zeros(2), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add one batch: see the class."""
        predicted = _predicted(self, preds, target)
        scores = preds.to(self.sums.dtype)
        scores = scores.softmax(-1) if self.logits else scores
        confidence = scores.gather(-1, predicted[..., None])[..., 0]
        counted = target != self.ignore_index
        for part, chosen in enumerate((predicted == target, predicted != target)):
            chosen = chosen & counted
            # NaN times 0 is NaN: what does not count is replaced.
            self.sums[part] += confidence.where(chosen, confidence.new_zeros(())).sum()
            self.counts[part] += chosen.sum()

    def compute(self) -> dict[str, Tensor]:
        """Return the mean confidences "right", "wrong" and "all"."""
        right, wrong = self.sums / self.counts
        return {"right": right, "wrong": wrong, "all": self.sums.sum() / self.counts.sum()}


class PerClassAccuracy(Metric):
    """For each class, by its name, the share of its samples that are predicted right (its recall).

    ``update(preds, target)`` takes scores [..., classes] or class ids [...], and class ids [...].
    ``compute()`` gives a dict of class names to shares from 0 to 1, and nan for a class without
    samples. ``MulticlassAccuracy(average=None)`` of torchmetrics gives 0 for it, as if all were wrong.

    Args:
        labels: the names of the class ids, or a mapping of ids to names, such as ``id2label``.
        ignore_index: the target of entries that do not count.

    Raises:
        ValueError: two classes have one name. From ``update``: shapes or class ids do not fit.
    """

    full_state_update = False
    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(
        self, labels: Sequence[str] | Mapping[int, str], ignore_index: int = -100, **options: Any
    ) -> None:
        super().__init__(**options)
        self.labels = names_by_id(labels)
        twice = next((name for name in self.labels if self.labels.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"PerClassAccuracy: two classes have the name {twice!r}")
        self.ignore_index = ignore_index
        for name in ("right", "total"):
            zeros = torch.zeros(len(self.labels), dtype=torch.long)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count one batch: see the class."""
        predicted = _predicted(self, preds, target)
        # One more class takes what does not count, which needs no wait for the device.
        most = len(self.labels)
        classes = target.where(target != self.ignore_index, target.new_full((), most)).flatten()
        hits = (predicted == target).to(self.total.dtype).flatten()
        zeros = self.total.new_zeros(most + 1)
        self.right += zeros.index_add(0, classes, hits)[:most]
        self.total += zeros.index_add(0, classes, torch.ones_like(hits))[:most]

    def compute(self) -> dict[str, Tensor]:
        """Return the share of right predictions of each class under its name."""
        return dict(zip(self.labels, self.right / self.total))


def _predicted(metric: Metric, preds: Tensor, target: Tensor) -> Tensor:
    """Return class ids in the shape of ``target``."""
    if preds.shape[: target.ndim] == target.shape and preds.ndim == target.ndim + 1:
        return preds.argmax(-1)
    if preds.shape == target.shape and isinstance(metric, PerClassAccuracy):
        return preds
    raise ValueError(
        f"{type(metric).__name__}: preds of shape {list(preds.shape)} do not fit target of shape "
        f"{list(target.shape)}: give scores [..., classes], with the shape of target before the classes"
    )
