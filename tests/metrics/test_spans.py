"""SpanF1 against seqeval, on random tags and on those that no scheme would write."""

from __future__ import annotations

import random
import warnings

import pytest
import torch

from loopkit.metrics import SpanF1

PREFIXES = {
    None: "BIES",
    "IOB1": "BI",
    "IOB2": "BI",
    "IOE1": "IE",
    "IOE2": "IE",
    "IOBES": "BIES",
    "BILOU": "BILU",
}


def seqeval_scores(wanted, found, scheme, average):
    reason = "seqeval is not installed: pip install 'loopkit-torch[dev]'"
    v0 = pytest.importorskip("seqeval.metrics.sequence_labeling", reason=reason)
    from seqeval import scheme as schemes
    from seqeval.metrics import v1

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quotients without spans
        if scheme is None:
            return v0.precision_recall_fscore_support(wanted, found, average=average)[:3]
        return v1.precision_recall_fscore_support(
            wanted, found, average=average, scheme=getattr(schemes, scheme)
        )[:3]


@pytest.mark.parametrize("scheme", PREFIXES, ids=str)
def test_random_tags_score_as_in_seqeval(scheme):
    rng = random.Random(0)
    kinds = ["-x", "-y-z"] + ([""] if scheme is None else [])
    labels = ["O"] + [f"{prefix}{kind}" for prefix in PREFIXES[scheme] for kind in kinds]
    for _ in range(150):
        rows = [
            [rng.randrange(len(labels)) for _ in range(rng.randint(1, 8))]
            for _ in range(rng.randint(1, 4))
        ]
        guesses = [
            [i if rng.random() < 0.6 else rng.randrange(len(labels)) for i in row] for row in rows
        ]
        metric = SpanF1(labels, scheme)
        for guess, row in zip(guesses, rows):
            metric.update(torch.tensor([guess]), torch.tensor([row]))
        found = metric.compute()
        wanted, tags = ([[labels[i] for i in row] for row in part] for part in (rows, guesses))
        expected = seqeval_scores(wanted, tags, scheme, "micro")
        assert [found[k] for k in ("precision", "recall", "f1")] == pytest.approx(expected), (
            wanted,
            tags,
        )
        per_type = seqeval_scores(wanted, tags, scheme, None)
        # seqeval lists the types that occur in spans, by their names.
        seen = [
            kind for kind in sorted(metric.types) if metric.counts[metric.types.index(kind)].any()
        ]
        assert [list(found[kind].values()) for kind in seen] == [
            pytest.approx(row) for row in zip(*per_type)
        ]


def scored(wanted, found, scheme=None):
    labels = sorted({*wanted, *found, "O"})
    metric = SpanF1(labels, scheme)
    metric.update(*(torch.tensor([[labels.index(tag) for tag in row]]) for row in (found, wanted)))
    return metric.compute()


def test_a_span_that_begins_with_i_counts_by_default_and_not_strictly():
    wanted, found = ["B-x", "I-x", "O"], ["I-x", "I-x", "O"]
    assert scored(wanted, found)["f1"] == 1
    strict = scored(wanted, found, "IOB2")
    assert strict == {**dict.fromkeys(("precision", "recall", "f1"), 0.0), "x": strict["x"]}


def test_no_spans_at_all_score_zero():
    assert scored(["O", "O"], ["O", "O"]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert scored(["B-x", "O"], ["O", "O"])["recall"] == 0


def test_ignored_tokens_are_left_out_and_the_span_continues_after_them():
    metric = SpanF1({"0": "O", "1": "B-x", "2": "I-x"})
    metric.update(
        torch.tensor([[0, 1, 0, 2, 2], [1, 2, 0, 0, 0]]),
        torch.tensor([[-100, 1, -100, 2, -100], [-100, -100, -100, -100, -100]]),
    )
    assert metric.counts.tolist() == [[1, 1, 1]]


def test_scores_are_taken_as_their_largest():
    ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
    metric, scores = SpanF1(["O", "B-x", "I-x"]), torch.nn.functional.one_hot(ids, 3).float()
    metric.update(scores, ids)
    assert metric.compute()["x"]["f1"] == 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_division_into_batches_changes_nothing(size):
    generator = torch.Generator().manual_seed(1)
    preds, target = torch.randint(0, 5, (2, 20, 9), generator=generator)
    labels = ["O", "B-x", "I-x", "B-y", "I-y"]
    whole, parts = SpanF1(labels), SpanF1(labels)
    whole.update(preds, target)
    for batch in zip(preds.split(size), target.split(size)):
        parts.update(*batch)
    assert parts.compute() == whole.compute()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SpanF1(["O", "PER"]), "the label 'PER' is not a tag"),
        (lambda: SpanF1(["O", "E-x"], "IOB2"), "the scheme IOB2 has the prefixes I, O, B"),
        (lambda: SpanF1(["O"], "IOB"), "give one of IOB1, IOB2"),
        (lambda: SpanF1(["O", "B-f1"]), "the type 'f1' has the name of a result"),
        (lambda: SpanF1({0: "O", 2: "B-x"}), r"labels name the ids \[0, 2\]"),
        (lambda: SpanF1(["O"]).update(torch.zeros(2, 3), torch.zeros(2, 4)), r"\[2, 3\].*\[2, 4\]"),
        (
            lambda: SpanF1(["O"]).update(torch.tensor([[0]]), torch.tensor([[1]])),
            "the label id 1 is not one of the 1 labels",
        ),
    ],
)
def test_what_does_not_fit_is_said(make, says):
    with pytest.raises(ValueError, match=says):
        make()
