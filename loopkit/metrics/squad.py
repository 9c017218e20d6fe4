"""SQuAD: exact match and F1 of answers that start and end logits mark in a text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_OUTSIDE = (-1, -1)


class SQuAD(Metric):
    """Exact match and F1 of extracted answers, by the rules of the official SQuAD scripts.

    A long text is split into overlapping windows, the features. The answer to a question is the best
    span over all of its windows: the sum of its start and its end logit is the highest. All spans of up
    to ``max_answer_length`` tokens are tried. With ties, the first window wins, then the shorter span,
    then the earlier one. The offset mapping gives the span's characters in the text.

    ``update(start_logits, end_logits, feature)`` takes logits [features, tokens] and the number of
    each feature in ``features``, [features]. Windows of one question may be on different ranks.

    ``compute()`` gives "exact_match" and "f1", from 0 to 100 as the scripts do. With ``no_answer`` it
    gives the same for questions with and without an answer, as "has_answer" and "no_answer". Questions
    of which no window was seen do not count.

    Args:
        examples: for each question a mapping with "id", "context" and "answers": the texts, or a
            mapping with "text", as in the ``squad`` data set, or a list of such mappings, as in its
            JSON files.
        features: for each window a mapping with "example_id" and "offset_mapping": for each token its
            first character and the character after its last in the context, or None for a token that
            is not of the context. This is what transformers' examples prepare for validation.
        no_answer: whether a question may have no answer (SQuAD 2.0). The answer is then empty if the
            lowest score of token 0 over all windows, less the best span's, exceeds ``null_threshold``.
        null_threshold: see ``no_answer``, in logits.
        max_answer_length: the most tokens of an answer.

    Raises:
        ValueError: a feature belongs to no example. From ``update``: shapes do not fit.
    """

    full_state_update = False
    higher_is_better = True
    spans: list[Tensor]
    scores: list[Tensor]
    _offsets: Tensor

    def __init__(
        self,
        examples: Iterable[Mapping[str, Any]],
        features: Iterable[Mapping[str, Any]],
        no_answer: bool = False,
        null_threshold: float = 0.0,
        max_answer_length: int = 30,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.no_answer = no_answer
        self.null_threshold = null_threshold
        self.max_answer_length = max_answer_length
        self._examples = {
            example["id"]: (example["context"], _texts(example["answers"])) for example in examples
        }
        rows = [(row["example_id"], row["offset_mapping"]) for row in features]
        self._example_of = [example for example, _ in rows]
        unknown = next((each for each in self._example_of if each not in self._examples), None)
        if unknown is not None:
            raise ValueError(
                f"SQuAD: a feature has the example_id {unknown!r}, which no example has as its id"
            )
        self.register_buffer("_offsets", _padded([row for _, row in rows]), persistent=False)
        self.add_state("spans", [], dist_reduce_fx="cat")
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, start_logits: Tensor, end_logits: Tensor, feature: Tensor) -> None:
        """Find the best span of each feature of one batch: see the class."""
        if start_logits.shape != end_logits.shape or start_logits.shape[:1] != feature.shape:
            raise ValueError(
                f"SQuAD: start_logits {list(start_logits.shape)}, end_logits "
                f"{list(end_logits.shape)}, feature {list(feature.shape)}: give [features, tokens] "
                "twice and [features]"
            )
        offsets = self._offsets[feature, : start_logits.shape[1]]
        width = offsets.shape[1]
        outside = offsets[..., 0] >= offsets[..., 1]
        start, end = (
            logits[:, :width].float().masked_fill(outside, -torch.inf)
            for logits in (start_logits, end_logits)
        )
        best = start.new_full(feature.shape, -torch.inf)
        first, last = torch.zeros_like(feature), torch.zeros_like(feature)
        for length in range(min(self.max_answer_length, width)):
            sums = start[:, : width - length] + end[:, length:]
            place = sums.argmax(1)
            score = sums.gather(1, place[:, None])[:, 0]
            better = score > best
            best, first = best.where(~better, score), first.where(~better, place)
            last = last.where(~better, place + length)
        rows = torch.arange(len(feature), device=offsets.device)
        found = torch.stack([feature, offsets[rows, first, 0], offsets[rows, last, 1]], 1)
        null = start_logits[:, 0].float() + end_logits[:, 0].float()
        self.spans.append(found)
        self.scores.append(torch.stack([best, null], 1))

    def compute(self) -> dict[str, Any]:
        """Return exact match and F1, from 0 to 100."""
        pairs = [(text, self._examples[name][1]) for name, text in self.predictions().items()]
        found: dict[str, Any] = _means(pairs, self.no_answer)
        if self.no_answer:
            for name, has in (("has_answer", True), ("no_answer", False)):
                chosen = [pair for pair in pairs if any(map(normalized, pair[1])) == has]
                if chosen:
                    found[name] = _means(chosen, True)
        return found

    def predictions(self) -> dict[str, str]:
        """Return the text of each answer by the id of its question, in the order of the features."""
        if not len(self.spans):
            return {}
        spans, scores = (dim_zero_cat(state).cpu() for state in (self.spans, self.scores))
        # Metric.set_dtype makes floats of whole numbers too.
        seen = zip(spans.long().tolist(), scores.tolist())
        best: dict[str, tuple[float, str]] = {}
        nulls: dict[str, float] = {}
        for (feature, first, after), (score, null) in sorted(seen, key=lambda row: row[0][0]):
            name = self._example_of[feature]
            best.setdefault(name, (-np.inf, ""))
            if score > best[name][0]:
                best[name] = score, self._examples[name][0][first:after]
            nulls[name] = min(null, nulls.get(name, np.inf))
        return {
            name: "" if self.no_answer and nulls[name] - score > self.null_threshold else text
            for name, (score, text) in best.items()
        }


def normalized(text: str) -> str:
    """Return a text without case, ASCII punctuation, English articles and surplus spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the prediction is one of the answers once both are normalised, else 0."""
    return float(any(normalized(prediction) == normalized(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str], no_answer: bool = False) -> float:
    """Return the F1 of the words that the prediction shares with an answer, for the best answer.

    Args:
        prediction: the predicted text.
        answers: the texts that are right.
        no_answer: whether two texts without words are equal, as in SQuAD 2.0. In 1.1 they have 0.
    """
    return max(
        _f1(normalized(prediction).split(), normalized(a).split(), no_answer) for a in answers
    )


def _f1(found: list[str], wanted: list[str], no_answer: bool) -> float:
    if no_answer and not (found and wanted):
        return float(found == wanted)
    shared = (Counter(found) & Counter(wanted)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


def _means(pairs: Sequence[tuple[str, list[str]]], no_answer: bool) -> dict[str, float]:
    exact, words = [], []
    for text, answers in pairs:
        if no_answer:
            # The script of SQuAD 2.0 leaves out answers without words. None left: there is no answer.
            answers = [answer for answer in answers if normalized(answer)] or [""]
        exact.append(exact_match(text, answers))
        words.append(f1(text, answers, no_answer))
    count = len(pairs)
    return {
        "exact_match": 100 * sum(exact) / count if count else float("nan"),
        "f1": 100 * sum(words) / count if count else float("nan"),
    }


def _texts(answers: Any) -> list[str]:
    if isinstance(answers, Mapping):
        answers = answers["text"]
    return [answer["text"] if isinstance(answer, Mapping) else answer for answer in answers]


def _padded(rows: Sequence[Any]) -> Tensor:
    """Return the offsets of all features, [features, tokens, 2], -1 where there is no context."""
    width = max(map(len, rows), default=0)
    offsets = np.full((len(rows), width, 2), -1, dtype=np.int64)
    for row, pairs in zip(offsets, rows):
        if len(pairs):
            row[: len(pairs)] = [_OUTSIDE if pair is None else tuple(pair) for pair in pairs]
    return torch.from_numpy(offsets)
