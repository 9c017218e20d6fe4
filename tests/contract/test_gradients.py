"""Gradients are finished in one order under every strategy, with the same results."""

from __future__ import annotations

import pytest
import torch

from tests.contract import coordination_jobs, gradient_jobs

ALONE = ["single", "device_map"]
ON_RANKS = ["ddp", "fsdp"]
ORDER = {
    "fp32": ["divide", "norm", "check", "clip_norm", "clip_value"],
    "fp16": ["divide", "unscale", "norm", "clip_norm", "clip_value"],
}


@pytest.mark.parametrize("precision", ORDER)
@pytest.mark.parametrize("strategy", [*ALONE, *ON_RANKS])
def test_the_stages_run_in_one_order(pair, strategy, precision):
    if strategy in ALONE:
        found = [gradient_jobs.stages(strategy, precision)]
    else:
        found = pair.call(gradient_jobs.stages, strategy, precision)
    assert all(stages == ORDER[precision] for stages in found), found


@pytest.mark.parametrize(
    "settings", [{"clip_norm": 0.05}, {"clip_value": 1e-3}, {"clip_norm": 0.05, "clip_value": 1e-3}]
)
def test_the_results_are_the_same(pair, settings):
    alone = gradient_jobs.finished("single", **settings)
    others = [gradient_jobs.finished("device_map", **settings)]
    for strategy in ON_RANKS:
        others += pair.call(gradient_jobs.finished, strategy, **settings)
    for other in others:
        assert other.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-7)


def test_a_step_without_a_gradient_is_one_error(pair):
    told = [gradient_jobs.no_gradient(strategy) for strategy in ALONE]
    for strategy in ON_RANKS:
        told += pair.call(gradient_jobs.no_gradient, strategy)
    assert set(told) == {
        "TaskError: the loss reaches no parameter of main: no gradient was computed"
    }


@pytest.mark.parametrize("strategy", ON_RANKS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_later_loss_that_is_not_finite_on_one_rank_leaves_all_ranks_alike(pair, strategy, rank):
    first, second = pair.call(gradient_jobs.two_losses, strategy, rank)
    before = gradient_jobs.Tiny(dropout=0.0).state_dict()
    for name, weight in first.items():
        assert torch.equal(second[name], weight), name
        assert torch.equal(weight, before[name]) == name.startswith("net.3"), name


@pytest.mark.parametrize("on_nan", ["raise", "skip"])
def test_under_a_loss_scaler_all_ranks_learn_of_a_loss_that_is_not_finite(pair, on_nan):
    told = {}
    for strategy in ON_RANKS:
        first, second = pair.call(
            coordination_jobs.not_finite, 1, "infinite", on_nan, "fp16", strategy
        )
        assert first == second
        told[strategy] = first[0]
    assert told["ddp"] == told["fsdp"]
