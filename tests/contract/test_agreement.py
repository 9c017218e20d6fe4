"""Ranks that were started with other settings, versions or code end before the first step."""

from __future__ import annotations

import pytest

from loopkit.distributed.process_group import check_backends
from loopkit.errors import OptionError
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
def test_some_things_may_be_other_by_rank(pair, what):
    assert pair.call(agreement_jobs.allowed, what) == ["finished", "finished"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("held_by", [None, 0, 1])
def test_run_directories_that_differ_by_machine_are_found_before_the_first_step(
    pair, tmp_path, strategy, held_by
):
    first, second = pair.call(agreement_jobs.apart, tmp_path, strategy, held_by=held_by)
    assert first == second
    assert (
        f"rank 1 cannot see the run directory of rank 0, {tmp_path / 'disk-0' / 'runs/a'}" in first
    )
    assert first.endswith("[0 steps]")
    assert ("rank 1 holds step-000000000032 there" in first) == (held_by == 1)
    assert not list(tmp_path.rglob(".ranks-*"))


def test_a_run_that_saves_nothing_needs_no_common_directory(pair, tmp_path):
    told = pair.call(agreement_jobs.apart, tmp_path, "ddp", checkpoint=False, resume=None)
    assert told == ["finished", "finished"]


@pytest.mark.parametrize(("nodes", "right"), [(1, True), (2, False), (3, False)])
def test_a_number_of_machines_that_was_not_started_is_refused(pair, nodes, right):
    for told in pair.call(agreement_jobs.other_nodes, nodes):
        assert (told == "finished") == right
        assert right or told.startswith(f"nodes={nodes}, and processes were started on 1 machine:")


def test_each_rank_of_a_group_that_would_train_alone_says_so(pair, tmp_path):
    told = pair.call(agreement_jobs.alone_in_a_group, str(tmp_path / "run"))
    assert [
        f"this one is rank {rank} of 2 in a process group" in told[rank] for rank in (0, 1)
    ] == [
        True,
        True,
    ]
    assert not (tmp_path / "run").exists()


def test_a_group_that_does_not_send_what_loopkit_sends_is_refused_with_the_remedy():
    check_backends("cpu:gloo,cuda:nccl", "cuda")
    check_backends("cpu:gloo,cuda:gloo", "cpu")
    with pytest.raises(OptionError, match=r"sends cuda:nccl, .*backend='cpu:gloo,cuda:nccl'"):
        check_backends("cuda:nccl", "cuda")
