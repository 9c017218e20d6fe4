"""The labels of a transformers model: which columns they are, their types, and their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loopkit.errors import DataError, missing_extra

IGNORED = -100
"""The label of positions that the loss ignores."""

# Causal models that compare the output at a position with the label at the same position: their
# labels are shifted by the user.
_UNSHIFTED = {
    "BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM", "BlenderbotSmallForCausalLM",
    "CpmAntForCausalLM", "MBartForCausalLM", "MarianForCausalLM", "MvpForCausalLM", "PegasusForCausalLM",
    "TrOCRForCausalLM", "WhisperForCausalLM", "XLMWithLMHeadModel",
}  # fmt: skip
_NEAR = 0.01


def label_columns(model: nn.Module) -> list[str]:
    """Return the arguments of the model's ``forward`` that are labels.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    try:
        from transformers.utils import find_labels
    except ImportError as error:
        raise missing_extra("transformers", "hf", "HFTask") from error
    return list(find_labels(type(model)))


class Labels:
    """The labels of one model.

    Whether a causal model compares the output at a position with the next label is known by its
    class. The first batch with logits and a loss decides it by computing the loss both ways.

    Attributes:
        names: the columns that are labels.
        shifts: whether the loss compares each output with the next label.
    """

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.shifts = shifts_labels(model)
        self._model = model
        self._decided = False

    def cast(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return ``batch`` with labels of the type that the model's loss takes.

        Whole numbers and booleans become int64. They become float32 for a regression and for
        several labels per sample.

        Raises:
            DataError: labels are texts.
        """
        changed = {}
        for name in self.names:
            value = batch.get(name)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
                raise DataError(
                    f"the column {name} holds texts, such as {value[0]!r}: give each class a number "
                    "from 0 on, and the model the names, as id2label"
                )
            if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
                continue
            wanted = torch.float32 if self._are_values(value) else torch.int64
            if value.dtype != wanted:
                changed[name] = value.to(wanted)
        return {**batch, **changed} if changed else batch

    def _are_values(self, labels: Tensor) -> bool:
        """Return whether the loss compares outputs with the labels as numbers, not as classes."""
        config = getattr(self._model, "config", None)
        if not type(self._model).__name__.endswith("ForSequenceClassification"):
            return False
        kind = getattr(config, "problem_type", None)
        if kind is None:
            several = labels.dtype == torch.bool and labels.ndim > 1
            return several or getattr(config, "num_labels", 0) == 1
        return kind in ("regression", "multi_label_classification")

    def count(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Return the number of labels that the loss averages; None if each sample counts once."""
        labels = [batch[name] for name in self.names if name in batch]
        if (
            len(labels) != 1
            or not isinstance(labels[0], Tensor)
            or not labels[0].ndim
            or labels[0].is_floating_point()
        ):
            return None
        counted = labels[0][..., 1:] if labels[0].ndim > 1 and self.shifts else labels[0]
        return (counted != self._ignored).sum()

    @property
    def _ignored(self) -> int:
        config = getattr(self._model, "config", None)
        return int(getattr(config, "semantic_loss_ignore_index", IGNORED))

    def observe(self, batch: Mapping[str, Any], out: Mapping[str, Any]) -> None:
        """Decide by a first batch whether the loss shifts labels; a compiled step leaves it."""
        if self._decided or torch.compiler.is_compiling():
            return
        labels = [batch[name] for name in self.names if name in batch]
        loss, logits = out.get("loss"), out.get("logits")
        if len(labels) != 1 or not isinstance(loss, Tensor):
            return
        if (
            not isinstance(logits, Tensor)
            or not isinstance(labels[0], Tensor)
            or labels[0].is_floating_point()
            or labels[0].ndim != 2
            or logits.shape[:-1] != labels[0].shape
        ):
            self._decided = True
            return
        found = _shifts_in(logits.detach(), labels[0], float(loss.detach()), self._ignored)
        if found is not None:
            self.shifts, self._decided = found, True


def _shifts_in(logits: Tensor, labels: Tensor, loss: float, ignored: int) -> bool | None:
    """Return whether ``loss`` is that of the next labels; None if it is nearer to neither."""
    far = []
    for at, of in ((logits[:, :-1], labels[:, 1:]), (logits, labels)):
        total = sum(
            float(F.cross_entropy(row.float(), each, ignore_index=ignored, reduction="sum"))
            for row, each in zip(at, of, strict=True)
        )
        count = int((of != ignored).sum())
        far.append(abs(total / count - loss) if count else float("nan"))
    if not min(far) <= _NEAR * (1 + abs(loss)) or far[0] == far[1]:
        return None
    return far[0] < far[1]


def shifts_labels(model: Any) -> bool:
    """Return whether a model of this class compares each output with the next label."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    names = {kind.__name__ for kind in type(model).__mro__}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or names & _UNSHIFTED:
        return False
    loss = getattr(model, "loss_type", None)
    return bool(names & {*CAUSAL.values()}) or loss in ("ForCausalLM", "ForConditionalGeneration")
