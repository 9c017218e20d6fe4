"""Ranks that were started with other settings, versions or code end before the first step."""

from __future__ import annotations

import pytest

from tests.contract import agreement_jobs


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("lr", "the argument lr of Plain is 0.1 on rank 0 and 0.01 on rank 1"),
        ("width", "the shape of net.weight is [2, 2] on rank 0 and [3, 2] on rank 1"),
        ("count", "the argument count of Plain is 12 on rank 0 and 16 on rank 1"),
        ("task", "the task is Plain on rank 0 and Other on rank 1"),
        ("seed", "the option seed is 0 on rank 0 and 3 on rank 1"),
        ("accumulate", "the option accumulate is 1 on rank 0 and 2 on rank 1"),
        ("precision", "the option precision is fp32 on rank 0 and bf16 on rank 1"),
        ("epochs", "the option epochs is None on rank 0 and 5 on rank 1"),
        ("loopkit", "loopkit's version is 0."),
        ("torch", "torch's version is 2."),
        ("optimizer", "momentum of the optimizer main, group 0 is 0.0 on rank 0 and 0.9 on rank 1"),
        ("code", "the code of tests.contract.agreement_jobs (as a digest) is "),
        ("call", "the call is train on rank 0 and evaluate or predict on rank 1"),
    ],
)
def test_what_a_rank_has_otherwise_is_named_before_the_first_step(pair, what, message):
    first, second = pair.call(agreement_jobs.differing, what)
    assert first == second
    assert first.startswith("the ranks were started differently: ")
    assert message in first
    assert first.endswith("[0 steps]")


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed"])
@pytest.mark.parametrize("what", ["width", "lr", "optimizer"])
def test_sharding_strategies_compare_before_they_send(pair, strategy, what):
    first, second = pair.call(agreement_jobs.differing, what, strategy)
    assert first == second
    assert "on rank 0 and" in first
    assert first.endswith("[0 steps]")


def test_ranks_with_one_value_are_listed_together(pool):
    told = pool(3).call(agreement_jobs.differing, "lr")
    assert len(set(told)) == 1
    assert "lr of Plain is 0.1 on ranks 0, 2 and 0.01 on rank 1" in told[0]


@pytest.mark.parametrize("what", ["sharded", "device", "sets", "objects", "hooks", "loggers"])
def test_what_a_rank_has_for_itself_may_differ(pair, what):
    assert pair.call(agreement_jobs.allowed, what) == ["finished", "finished"]
