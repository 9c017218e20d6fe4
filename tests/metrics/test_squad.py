"""SQuAD against a plain reading of the rules: every window, every span, one after the other."""

from __future__ import annotations

import random
import re
import string

import pytest
import torch

from loopkit.metrics import SQuAD
from loopkit.metrics.squad import exact_match, f1, normalized

WORDS = [
    "The",
    "a",
    "cat,",
    "Été",
    "naïve",
    "日本",
    "an",
    "U.S.",
    "mat",
    "(x)",
    "—",
    "the-end",
    "3.5",
]


def plain_normalized(text):
    text = text.lower()
    for mark in string.punctuation:
        text = text.replace(mark, "")
    return [word for word in re.sub(r"\b(a|an|the)\b", " ", text).split() if word]


def plain_scores(prediction, answers, version):
    """Exact match and F1 of one question."""
    if version == 2:
        answers = [answer for answer in answers if plain_normalized(answer)] or [""]
    best = 0.0
    found = plain_normalized(prediction)
    for answer in answers:
        wanted, left, same = plain_normalized(answer), list(plain_normalized(answer)), 0
        for word in found:
            if word in left:
                left.remove(word)
                same += 1
        if version == 2 and (not found or not wanted):
            best = max(best, float(found == wanted))
        elif same:
            best = max(best, 2 * same / (len(found) + len(wanted)))
    return float(any(found == plain_normalized(answer) for answer in answers)), best


def plain_answer(context, windows, version, threshold, longest):
    """The best text over the windows of one question: (offsets, start logits, end logits)."""
    candidates, null = [], float("inf")
    for number, (offsets, start, end) in enumerate(windows):
        null = min(null, start[0] + end[0])
        for i, first in enumerate(offsets):
            for j in range(i, min(i + longest, len(offsets))):
                if first is not None and offsets[j] is not None:
                    score = start[i] + end[j]
                    rank = (-score, number, j - i, i)
                    candidates.append((rank, score, context[first[0] : offsets[j][1]]))
    if not candidates:
        return ""
    _, score, text = min(candidates)
    return "" if version == 2 and null - score > threshold else text


def questions(seed, version, count=6, ties=False):
    """Made questions, and their windows of different lengths that overlap, in random order."""
    rng = random.Random(seed)
    examples, features, logits = [], [], []
    for number in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 12))
        context, offsets, place = " ".join(words), [], 0
        for word in words:
            offsets.append((place, place + len(word)))
            place += len(word) + 1
        answers = [
            " ".join(words[i : i + rng.randint(1, 3)]) for i in rng.choices(range(len(words)), k=2)
        ]
        if version == 2 and rng.random() < 0.4:
            answers = []
        examples.append({"id": f"q{number}", "context": context, "answers": {"text": answers}})
        for first in range(0, len(words), 3):
            row = [None, None, *offsets[first : first + 5], None]
            features.append({"example_id": f"q{number}", "offset_mapping": row})
            pick = (lambda: float(rng.randint(0, 2))) if ties else (lambda: rng.gauss(0, 3))
            logits.append([[pick() for _ in row] for _ in "se"])
    return examples, features, logits


def updated(metric, logits, order, size):
    for at in range(0, len(order), size):
        numbers = order[at : at + size]
        width = max(len(logits[n][0]) for n in numbers)
        start, end = (
            torch.tensor(
                [logits[n][part] + [9.0] * (width - len(logits[n][part])) for n in numbers]
            )
            for part in (0, 1)
        )
        metric.update(start, end, torch.tensor(numbers))
    return metric.compute()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_answers_and_scores_are_those_of_the_plain_rules(seed, version, ties):
    examples, features, logits = questions(seed, version, ties=ties)
    logits = [torch.tensor(pair).tolist() for pair in logits]  # in float32
    options = {"no_answer": version == 2, "null_threshold": 0.5, "max_answer_length": 3}
    texts, scores = {}, []
    for example in examples:
        windows = [
            (feature["offset_mapping"], *logits[n])
            for n, feature in enumerate(features)
            if feature["example_id"] == example["id"]
        ]
        text = plain_answer(example["context"], windows, version, 0.5, 3)
        texts[example["id"]] = text
        scores.append(plain_scores(text, example["answers"]["text"], version))
    order = list(range(len(features)))
    random.Random(seed).shuffle(order)
    for size in (1, 4, 100):
        metric = SQuAD(examples, features, **options)
        found = updated(metric, logits, order, size)
        assert metric.predictions() == texts
        for name, column in zip(("exact_match", "f1"), zip(*scores)):
            assert found[name] == pytest.approx(100 * sum(column) / len(column))
        if version == 2:
            empty = [
                pair
                for pair, e in zip(scores, examples)
                if not any(map(plain_normalized, e["answers"]["text"]))
            ]
            assert ("no_answer" in found) == bool(empty)
            if empty:
                mean = 100 * sum(exact for exact, _ in empty) / len(empty)
                assert found["no_answer"]["exact_match"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("prediction", "answers", "version"),
    [
        ("the", ["The"], 1), ("the", ["The"], 2), ("", ["x"], 1), ("", [], 2), ("x", [], 2), ("", ["..."], 2),
        ("U.S.", ["us"], 1), ("a cat a cat", ["cat"], 1), ("Été", ["été"], 1), ("—", ["-"], 1), ("x y", ["y z", "x"], 1),
        ("theatre an", ["atre"], 1), ("日本 the", ["日本"], 2), ("well-known", ["well known"], 1),
    ],
)  # fmt: skip
def test_texts_score_as_by_the_plain_rules(prediction, answers, version):
    expected = plain_scores(prediction, answers, version)
    kept = [a for a in answers if normalized(a)] or [""] if version == 2 else answers
    assert (exact_match(prediction, kept), f1(prediction, kept, version == 2)) == expected


def test_torchmetrics_gives_the_same_for_texts():
    from torchmetrics.text import SQuAD as OfTexts

    rng = random.Random(0)
    for _ in range(100):
        text, *answers = (" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) for _ in range(3))
        found = OfTexts()(
            [{"prediction_text": text, "id": "1"}],
            [{"answers": {"text": answers, "answer_start": [0, 0]}, "id": "1"}],
        )
        assert found["exact_match"] == 100 * exact_match(text, answers)
        assert found["f1"].item() == pytest.approx(100 * f1(text, answers), rel=1e-5)


def test_a_window_without_context_gives_an_empty_answer():
    example = {"id": 1, "context": "cat", "answers": [{"text": "cat"}]}
    metric = SQuAD([example], [{"example_id": 1, "offset_mapping": [None, (0, 0)]}])
    assert updated(metric, [[[1.0, 2.0], [1.0, 2.0]]], [0], 1) == {"exact_match": 0, "f1": 0}
    assert metric.predictions() == {1: ""}


def test_nothing_seen_is_nan_and_what_does_not_fit_is_said():
    example = {"id": 1, "context": "cat", "answers": ["cat"]}
    metric = SQuAD([example], [{"example_id": 1, "offset_mapping": [(0, 3)]}])
    with pytest.warns(UserWarning, match="before"):
        assert str(metric.compute()) == "{'exact_match': nan, 'f1': nan}"
    with pytest.raises(ValueError, match=r"start_logits \[1, 2\], end_logits \[1, 3\]"):
        metric.update(torch.zeros(1, 2), torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="the example_id 'other', which no example has"):
        SQuAD([example], [{"example_id": "other", "offset_mapping": []}])


def test_states_that_torchmetrics_gathered_itself_give_the_same():
    examples, features, logits = questions(3, 2)
    alone = updated(SQuAD(examples, features, no_answer=True), logits, [*range(len(features))], 3)
    ranks = [SQuAD(examples, features, no_answer=True) for _ in range(2)]
    for rank, metric in enumerate(ranks):
        updated(metric, logits, [*range(rank, len(features), 2)], 2)
    for name in ("spans", "scores"):  # as Metric.sync does with states to concatenate
        setattr(ranks[0], name, torch.cat([part for rank in ranks for part in getattr(rank, name)]))
    ranks[0]._computed = None
    # A process group that an earlier test of this process left would gather the states again.
    ranks[0]._to_sync = False
    assert ranks[0].compute() == alone
