"""Evaluation and prediction over several ranks take every sample once and give the same numbers."""

from __future__ import annotations

import pytest
import torch

from tests.contract import evaluation_jobs, jobs

STRATEGIES = ["ddp", "fsdp", "zero2", "zero3"]


# Each remainder of a share of the ranks comes up, and so does a second round of batches.
SWEEPS = [
    (1, range(1, 8), range(17)),
    (2, (1, 3, 4), range(18)),
    (3, (1, 4), range(14)),
    (4, (3,), range(26)),
]
ALL = [pytest.param(size, range(1, 8), range(51), marks=pytest.mark.long) for size in (1, 2, 3, 4)]


@pytest.mark.parametrize(("size", "batches", "counts"), [*SWEEPS, *ALL])
def test_every_sample_is_scored_and_predicted_once_whatever_the_sizes(pool, size, batches, counts):
    wrong = pool(size).call(evaluation_jobs.sweep, counts, batches)
    assert wrong == [[]] * size


@pytest.mark.parametrize(
    ("strategy", "count"),
    [(s, n) for s in STRATEGIES for n in ((7, 33) if s == "zero3" else (1, 7, 20, 33))],
)
@pytest.mark.parametrize("kind", ["dataset", "list"])
def test_metrics_are_those_of_one_process(pool, strategy, kind, count):
    task = {"count": count, "kind": kind}
    alone = jobs.evaluate("single", "scored", task, batch_size=3)
    for size in (2, 3):
        for found in pool(size).call(jobs.evaluate, strategy, "scored", task, batch_size=3):
            assert found.keys() == alone.keys()
            for name, value in alone.items():
                if "runtime" not in name and "per_second" not in name:
                    assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name
            assert found["eval/seen"] == count


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_loss_weighted_by_tokens_is_that_of_one_process(pair, strategy):
    alone = jobs.evaluate("single", "words", batch_size=4)
    for found in pair.call(jobs.evaluate, strategy, "words", batch_size=4):
        assert found["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-12)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_predictions_come_in_the_order_of_the_data_on_every_rank(pair, strategy):
    alone = jobs.predict("single", "scored", {"count": 23}, batch_size=4)
    assert alone["ids"].tolist() == list(range(23))
    for found in pair.call(jobs.predict, strategy, "scored", {"count": 23}, batch_size=4):
        assert torch.equal(found["ids"], alone["ids"])
        assert found["names"] == alone["names"]


@pytest.mark.parametrize(("size", "strategy"), [(2, "ddp"), (3, "ddp"), (2, "fsdp"), (2, "zero3")])
def test_wrappers_and_logged_scalars_are_those_of_one_process(pool, size, strategy):
    calls = [(23, 5, False), (7, 3, True), (1, 4, False), (16, 4, False)]
    alone = jobs.wrapped("single", *calls)
    for ranks in pool(size).call(jobs.wrapped, strategy, *calls):
        for found, expected in zip(ranks, alone, strict=True):
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                if "runtime" not in name and "per_second" not in name:
                    assert found[name] == pytest.approx(value, rel=1e-7, abs=1e-7, nan_ok=True), (
                        name
                    )


@pytest.mark.parametrize(("size", "count", "batch"), [(2, 7, 3), (2, 9, 2), (3, 1, 4), (3, 10, 3)])
def test_nested_and_ragged_outputs_come_in_order_from_all_ranks(pool, size, count, batch):
    assert pool(size).call(evaluation_jobs.nested, count, batch) == [[]] * size


def test_a_writer_gets_all_batches_in_order_on_rank_0(pair):
    first, second = pair.call(
        jobs.predict, "ddp", "scored", {"count": 23}, writer=True, batch_size=4
    )
    assert second == []
    assert [part["ids"].tolist() for part in first] == [
        list(range(i, min(i + 4, 23))) for i in range(0, 23, 4)
    ]
