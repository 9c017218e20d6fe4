"""ROUGELsum: the ROUGE-L of texts of several sentences, one a line, as rouge_score computes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class ROUGELsum(Metric):
    """Precision, recall and F1 of the longest common subsequences of all lines (ROUGE-Lsum).

    ``ROUGEScore`` of torchmetrics gives the ROUGE-1, ROUGE-2 and ROUGE-L of rouge_score
    (https://github.com/google-research/google-research/tree/master/rouge), but another ROUGE-Lsum: it
    finds sentences with a model of nltk, which it downloads. This one takes each line as a sentence,
    as rouge_score does. For a line of the target, the words in its longest common subsequence with
    any predicted line count (Lin 2004, section 3.2). Words are runs of the letters a to z and digits
    in the text in lower case.

    ``update(preds, target)`` takes two texts or two lists of texts. ``compute()`` gives the means over
    texts, "rougeLsum_precision", "rougeLsum_recall" and "rougeLsum_fmeasure", each from 0 to 1, or nan without texts.

    Args:
        use_stemmer: whether words of more than three letters lose their endings, which needs nltk.

    Raises:
        ValueError: from ``update``, if the lists have different lengths.
        ModuleNotFoundError: ``use_stemmer`` without nltk.
    """

    full_state_update = False
    higher_is_better = True
    scores: list[Tensor]

    def __init__(self, use_stemmer: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._stemmer: Any = None
        if use_stemmer:
            from nltk.stem.porter import PorterStemmer

            self._stemmer = PorterStemmer().stem
        self.add_state("scores", [], dist_reduce_fx="cat")

    def update(self, preds: str | Sequence[str], target: str | Sequence[str]) -> None:
        """Score one batch: see the class."""
        preds, target = ([texts] if isinstance(texts, str) else texts for texts in (preds, target))
        if len(preds) != len(target):
            raise ValueError(
                f"ROUGELsum: {len(preds)} preds and {len(target)} targets: give as many"
            )
        found = [self._score(*pair) for pair in zip(preds, target)]
        # MPS has no double precision.
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self.scores.append(torch.tensor(found, dtype=dtype, device=self.device).reshape(-1, 3))

    def compute(self) -> dict[str, Tensor]:
        """Return the means over all texts."""
        scores: Tensor = dim_zero_cat(self.scores if len(self.scores) else [torch.zeros(0, 3)])
        names = ("precision", "recall", "fmeasure")
        return {f"rougeLsum_{name}": value for name, value in zip(names, scores.mean(0))}

    def _words(self, text: str) -> list[list[str]]:
        """Return the words of each line that is not empty."""
        lines = [re.findall("[a-z0-9]+", line.lower()) for line in text.split("\n") if line]
        if self._stemmer is None:
            return lines
        return [[self._stemmer(word) if len(word) > 3 else word for word in line] for line in lines]

    def _score(self, pred: str, target: str) -> tuple[float, float, float]:
        found, wanted = self._words(pred), self._words(target)
        # A word counts at most as often as it is in both texts.
        left = Counter(word for line in found for word in line)
        left_of_target = Counter(word for line in wanted for word in line)
        sizes = left.total(), left_of_target.total()
        hits = 0
        for line in wanted:
            common = {place for other in found for place in _common(line, other)}
            for place in sorted(common):
                word = line[place]
                if left[word] > 0 and left_of_target[word] > 0:
                    hits += 1
                    left[word] -= 1
                    left_of_target[word] -= 1
        precision, recall = (hits / max(1, size) for size in sizes)
        return precision, recall, 2 * precision * recall / max(precision + recall, 1e-300)


def _common(line: list[str], other: list[str]) -> list[int]:
    """Return the places in ``line`` of one longest common subsequence with ``other``.

    There may be several. As in rouge_score, a walk from the ends goes back in ``line`` where leaving
    out either last word would do.
    """
    rows = [[0] * (len(other) + 1)]
    for word in line:
        row, above = [0], rows[-1]
        for place, candidate in enumerate(other):
            row.append(above[place] + 1 if word == candidate else max(above[place + 1], row[-1]))
        rows.append(row)
    places: list[int] = []
    i, j = len(line), len(other)
    while i and j:
        if line[i - 1] == other[j - 1]:
            i, j = i - 1, j - 1
            places.append(i)
        elif rows[i][j - 1] > rows[i - 1][j]:
            j -= 1
        else:
            i -= 1
    return places
