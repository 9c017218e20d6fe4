"""Metrics of texts against their reference implementations."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.text import BLEUScore, Perplexity, ROUGEScore

from loopkit.metrics import ROUGELsum

WORDS = [
    "the",
    "a",
    "cat",
    "Katze",
    "été",
    "mat.",
    "x_1",
    "3.5",
    "",
    "naïve",
    "\n",
    "\n",
    "running",
]
ADVERSARIAL = [
    ("", ""), ("", "a cat"), ("a cat", ""), ("...", "!?"), ("日本", "日本 a"), ("\n\n", "a\nb"),
    ("a b\nc", "c\na b"), ("a a a", "a"), ("a", "a a a"), ("a b a b", "b a b a"), ("x\r\ny", "x y"),
]  # fmt: skip


def texts(count=80, seed=0):
    rng = random.Random(seed)
    made = [
        [" ".join(rng.choices(WORDS, k=rng.randint(0, 15))) for _ in "pt"] for _ in range(count)
    ]
    return [*ADVERSARIAL, *made]


@pytest.fixture
def rouge_scorer():
    return pytest.importorskip(
        "rouge_score.rouge_scorer",
        reason="rouge_score is not installed: pip install 'loopkit-torch[dev]'",
    )


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_lsum_is_that_of_rouge_score(rouge_scorer, stemmer):
    reference = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=stemmer)
    whole, scores = ROUGELsum(use_stemmer=stemmer), []
    for pred, target in texts():
        metric = ROUGELsum(use_stemmer=stemmer)
        metric.update(pred, target)
        scores.append(tuple(reference.score(target, pred)["rougeLsum"]))
        assert [v.item() for v in metric.compute().values()] == pytest.approx(scores[-1]), (
            pred,
            target,
        )
    preds, targets = zip(*texts())
    whole.update(preds[:7], targets[:7])
    whole.update([], [])
    whole.update(preds[7:], targets[7:])
    means = torch.tensor(scores, dtype=torch.float64).mean(0).tolist()
    assert [v.item() for v in whole.compute().values()] == pytest.approx(means, rel=1e-12)


@pytest.mark.parametrize("stemmer", [False, True])
def test_torchmetrics_rouge_1_2_and_l_are_those_of_rouge_score(rouge_scorer, stemmer):
    keys = ("rouge1", "rouge2", "rougeL")
    reference = rouge_scorer.RougeScorer(keys, use_stemmer=stemmer)
    metric = ROUGEScore(use_stemmer=stemmer, rouge_keys=keys)
    for pred, target in texts(100):
        metric.reset()
        metric.update([pred], [target])
        found, expected = metric.compute(), reference.score(target, pred)
        for key in keys:
            for part in ("precision", "recall", "fmeasure"):
                value = getattr(expected[key], part)
                assert found[f"{key}_{part}"].item() == pytest.approx(value), (key, pred, target)


def test_rouge_without_texts_is_nan_and_lists_must_match():
    with pytest.raises(ValueError, match="1 preds and 2 targets"):
        ROUGELsum().update(["a"], ["a", "b"])
    empty = ROUGELsum()
    empty.update([], [])
    assert all(map(math.isnan, empty.compute().values()))


def words_of(text):
    return len(text.split())


def bleu(preds, targets):
    """BLEU-4 of a corpus by the definition of Papineni et al. 2002."""
    hits, totals, length, wanted = [0] * 4, [0] * 4, 0, 0
    for pred, references in zip(preds, targets):
        pred, references = pred.split(), [reference.split() for reference in references]
        length += len(pred)
        wanted += min((abs(len(each) - len(pred)), len(each)) for each in references)[1]
        for n in range(1, 5):
            grams = Counter(tuple(pred[i : i + n]) for i in range(len(pred) - n + 1))
            most = Counter()
            for each in references:
                most |= Counter(tuple(each[i : i + n]) for i in range(len(each) - n + 1))
            hits[n - 1] += (grams & most).total()
            totals[n - 1] += grams.total()
    if not all(hits):
        return 0.0
    mean = sum(math.log(hit / total) for hit, total in zip(hits, totals)) / 4
    return math.exp(mean + min(0.0, 1 - wanted / length))


@pytest.mark.parametrize("seed", range(8))
def test_torchmetrics_bleu_is_that_of_the_definition(seed):
    rng = random.Random(seed)
    words = ["the", "cat", "été", "日本"]
    made = [
        [" ".join(rng.choices(words, k=rng.randint(0, 12))) for _ in range(3)] for _ in range(20)
    ]
    # Of two references as far from the prediction's length, torchmetrics takes the first. The
    # definition's scripts take the shorter one.
    preds, targets = [row[0] for row in made], [sorted(row[1:], key=words_of) for row in made]
    metric = BLEUScore()
    for pred, target in zip(preds, targets):
        metric.update([pred], [target])
    assert metric.compute().item() == pytest.approx(bleu(preds, targets), rel=1e-5)


def test_torchmetrics_perplexity_is_the_exponential_of_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 9, 11, generator=generator)
    target = torch.randint(0, 11, (6, 9), generator=generator)
    target[2:, 5:] = -100
    metric = Perplexity(ignore_index=-100)
    for batch in zip(logits.split(4), target.split(4)):
        metric.update(*batch)
    expected = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100).exp()
    assert metric.compute().item() == pytest.approx(expected.item(), rel=1e-5)
