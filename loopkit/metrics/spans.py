"""SpanF1: precision, recall and F1 of tagged spans, such as named entities, by seqeval's rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from loopkit.metrics.class_names import names_by_id

# The rules of a scheme: its prefixes, then which neighbours start a span, continue it and end it.
# A rule is the prefix before, the prefix after, and whether their types must be equal (=), differ
# (!) or neither (*). "?" is every prefix. A span counts if a rule ends it.
_RULES = {
    None: ("IOBES", "?B* ?S* OI* OE* EI* EE* SI* SE* BI! BE! II! IE!", "BI= BE= II= IE=", "??*"),
    "IOB1": ("IOB", "OI* BI* II! IB= BB=", "BI= II=", "IO* IB* II! BO* BI! BB="),
    "IOB2": ("IOB", "?B*", "BI= II=", "IO* IB* II! BO* BB* BI!"),
    "IOE1": ("IOE", "OI* EI* II! EE=", "II= IE=", "IO* II! IE! EI= EE="),
    "IOE2": ("IOE", "OI* OE* EI* EE* II! IE!", "II= IE=", "E?*"),
    "IOBES": ("IOBES", "?B* ?S*", "BI= BE= II= IE=", "S?* E?*"),
    "BILOU": ("BILOU", "?B* ?U*", "BI= BL= II= IL=", "U?* L?*"),
}


class SpanF1(Metric):
    """Precision, recall and F1 of spans that tags mark, over all types and for each type.

    A predicted span is right if its type, its first and its last token are right. The rules are those
    of seqeval (https://github.com/chakki-works/seqeval). Without a scheme they are those of its
    default mode, which the CoNLL-2000 script defined: a span may begin with I. With one, they are
    those of its strict mode, which counts a span only if the scheme allows it. Counts are integers,
    so the result does not depend on how batches and ranks divide the data.

    ``update(preds, target)`` takes scores [sentences, tokens, labels] or label ids [sentences,
    tokens], and label ids [sentences, tokens]. It leaves out tokens whose target is ``ignore_index``.

    ``compute()`` gives "precision", "recall" and "f1" over all spans, each from 0 to 1, and a dict of
    the same for each type. A quotient without spans is 0, as in seqeval.

    Args:
        labels: the names of the label ids, such as ``["O", "B-person", "I-person"]``, or a mapping of
            ids to names, such as the ``id2label`` of a transformers configuration.
        scheme: "IOB1", "IOB2", "IOE1", "IOE2", "IOBES" or "BILOU" for strict mode.
        ignore_index: the target of tokens that do not count.

    Raises:
        ValueError: the scheme is unknown, or a label has a prefix that the scheme has not. From
            ``update``: shapes or label ids do not fit.
    """

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(
        self,
        labels: Sequence[str] | Mapping[int, str],
        scheme: str | None = None,
        ignore_index: int = -100,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if scheme not in _RULES:
            known = ", ".join(name for name in _RULES if name)
            raise ValueError(f"SpanF1(scheme={scheme!r}): give one of {known}, or None")
        prefixes, start, inside, end = _RULES[scheme]
        self.labels = names_by_id(labels)
        tags = [_parsed(label, prefixes, scheme) for label in self.labels]
        self.types = list(dict.fromkeys(kind for prefix, kind in tags if prefix != "O"))
        taken = {"precision", "recall", "f1"} & {*self.types}
        if taken:
            raise ValueError(
                f"SpanF1: the type {taken.pop()!r} has the name of a result: rename it"
            )
        self.ignore_index = ignore_index
        tags.append(("O", "_"))  # before the first token of a sentence, and after its last
        self._tags = tags
        self._start, self._inside, self._end = (
            [[_matches(rules.split(), a, b) for b in tags] for a in tags]
            for rules in (start, inside, end)
        )
        zeros = torch.zeros(len(self.types), 3, dtype=torch.long)
        self.add_state("counts", zeros, dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Count the spans of one batch: see the class."""
        if preds.ndim == target.ndim + 1:
            preds = preds.argmax(-1)
        if preds.shape != target.shape or target.ndim != 2:
            raise ValueError(
                f"SpanF1: preds of shape {list(preds.shape)} and target of shape "
                f"{list(target.shape)}: give [sentences, tokens], or scores [sentences, tokens, labels]"
            )
        counts = torch.zeros(len(self.types), 3, dtype=torch.long)
        for found, wanted in zip(preds.tolist(), target.tolist()):
            kept = [(p, t) for p, t in zip(found, wanted) if t != self.ignore_index]
            predicted, real = (self._spans([pair[part] for pair in kept]) for part in (0, 1))
            for column, spans in enumerate((predicted & real, predicted, real)):
                for kind, _, _ in spans:
                    counts[self.types.index(kind), column] += 1
        self.counts += counts.to(self.counts.device)

    def compute(self) -> dict[str, Any]:
        """Return precision, recall and F1 of all spans, and of each type under its name."""
        counts = self.counts.cpu()
        return _scores(*counts.sum(0).tolist()) | {
            kind: _scores(*row) for kind, row in zip(self.types, counts.tolist())
        }

    def _spans(self, ids: list[int]) -> set[tuple[str, int, int]]:
        """Return the spans of one sentence: type, first token, and the token after the last."""
        outside = len(self.labels)
        wrong = next((i for i in ids if not 0 <= i < outside), None)
        if wrong is not None:
            raise ValueError(f"SpanF1: the label id {wrong} is not one of the {outside} labels")
        ids = [*ids, outside]
        spans: set[tuple[str, int, int]] = set()
        before, first = outside, 0
        while first < len(ids) - 1:
            after = first + 1
            if self._start[before][ids[first]]:
                while self._inside[ids[after - 1]][ids[after]]:
                    after += 1
                if self._end[ids[after - 1]][ids[after]]:
                    spans.add((self._tags[ids[first]][1], first, after))
            before, first = ids[after - 1], after
        return spans


def _parsed(label: str, prefixes: str, scheme: str | None) -> tuple[str, str]:
    """Return prefix and type of a label; "_" is the type of a prefix alone, as in seqeval."""
    prefix, _, kind = label.partition("-")
    if prefix not in [*prefixes] or (prefix == "O" and kind):
        needs = f"the scheme {scheme} has" if scheme else "there are"
        raise ValueError(
            f"SpanF1: the label {label!r} is not a tag: {needs} the prefixes {', '.join(prefixes)}, "
            'as in "O" and "I-person"'
        )
    return prefix, kind or "_"


def _matches(rules: list[str], before: tuple[str, str], after: tuple[str, str]) -> bool:
    same = before[1] == after[1]
    return any(
        rule[0] in ("?", before[0])
        and rule[1] in ("?", after[0])
        and (rule[2] == "*" or same == (rule[2] == "="))
        for rule in rules
    )


def _scores(right: int, predicted: int, real: int) -> dict[str, float]:
    return {
        "precision": right / max(1, predicted),
        "recall": right / max(1, real),
        "f1": 2 * right / max(1, predicted + real),
    }
