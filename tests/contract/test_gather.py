"""A loss over the outputs of all ranks has the gradient of one big batch."""

from __future__ import annotations

import pytest
import torch

import loopkit
from tests.contract import gather_jobs
from tests.contract.test_training import distance


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
@pytest.mark.parametrize(
    "count", [24, 21, 20, 17], ids=["even", "ragged", "a rank without", "one left"]
)
def test_a_contrastive_loss_over_ranks_is_that_of_one_big_batch(pair, strategy, count):
    for options in ({}, {"accumulate": 2, "weighted": True, "clip_norm": 0.1}):
        first, second = pair.call(gather_jobs.train, strategy, count, batch_size=4, **options)
        alone = gather_jobs.train("single", count, batch_size=8, **options)
        assert distance(first, second) == 0
        assert distance(first, alone) < 2e-5


def test_three_ranks_do_so_too(pool):
    told = pool(3).call(gather_jobs.train, "ddp", 26, batch_size=4)
    assert distance(told[0], gather_jobs.train("single", 26, batch_size=12)) < 2e-5


def test_an_evaluation_that_gathers_is_refused(pair):
    for told in pair.call(gather_jobs.in_evaluation, "ddp"):
        assert "compute_metrics" in told


def test_rows_that_do_not_fit_together_are_named(pair):
    for told in pair.call(gather_jobs.of_other_shapes, "ddp"):
        assert "[n, 2] torch.float32 on rank 0, [n, 3] torch.float32 on rank 1" in told


def test_one_process_gathers_its_own():
    rows = torch.randn(3, 2, requires_grad=True)
    gathered, mine = loopkit.all_gather(rows)
    assert gathered is rows
    assert mine == slice(0, 3)
