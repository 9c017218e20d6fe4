"""LossWeighting against the mean over all terms, computed at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from loopkit.data.micro_batches import MicroBatches
from loopkit.distributed.communicator import Communicator
from loopkit.errors import DataError, TaskError
from loopkit.loops.loss_weighting import LossWeighting, power_of_two_below
from tests.support import Tiny


def group(*sizes: int) -> MicroBatches:
    batches = MicroBatches()
    batches.extend([None] * len(sizes))
    batches.sizes = list(sizes)
    batches.samples = batches.total = sum(sizes)
    return batches


def gradient(losses: list[float], weights: list[Any], sizes: list[int], **options: Any) -> float:
    """The gradient with respect to x of the step's loss, where each loss is x times a number."""
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    weighting = LossWeighting(group(*sizes), Communicator(), step=(Tiny(), "train_step"), **options)
    for loss, weight, size in zip(losses, weights, sizes):
        term = nothing(x) if math.isnan(loss) else x * loss
        weighting.scaled(term, weight, size).backward()
    divisor = weighting.divisor()
    return float(x.grad if divisor is None else x.grad / divisor)


def nothing(x: torch.Tensor) -> torch.Tensor:
    """A mean over no terms, as of targets that are all ignored."""
    loss = F.cross_entropy(torch.stack([x, -x])[None], torch.tensor([-100]))
    assert math.isnan(float(loss))
    return loss


def mean(losses: list[float], weights: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(losses, weights)) / math.fsum(weights)


@pytest.mark.parametrize("kind", [float, int, lambda w: torch.tensor(float(w)).double()])
def test_weights_give_the_mean_over_all_terms(kind):
    losses, weights = [1.5, -2.0, 7.0], [3, 5, 11]
    got = gradient(losses, [kind(w) for w in weights], [4, 4, 2])
    assert got == pytest.approx(mean(losses, weights), rel=1e-15)


def test_without_weights_a_micro_batch_counts_by_its_samples():
    assert gradient([1.0, 4.0], [None, None], [6, 2]) == pytest.approx(1.75, rel=1e-15)


@pytest.mark.parametrize("weights", [[None, None], [3.0, 5.0], [torch.tensor(3.0).double()] * 2])
def test_a_dummy_batch_has_the_weight_zero_even_where_its_loss_is_nan(weights):
    got = gradient([2.0, math.nan], weights, [4, 0])
    assert got == 2.0


def test_the_scale_changes_no_bit():
    losses, weights = [1.1, -0.3, 0.7], [7.0, 129.0, 3.0]
    assert len({gradient(losses, weights, [1, 1, 1], scale=2.0**n) for n in range(-8, 12)}) == 1


def test_one_micro_batch_on_one_rank_is_left_as_it_is():
    assert gradient([1.25], [None], [4], combined=False) == 1.25
    assert gradient([1.25], [9.0], [4], combined=False) == 1.25


def test_a_power_of_two_is_exact_at_and_around_each_power():
    for dtype in (torch.float32, torch.float64):
        powers = torch.tensor([2.0**n for n in range(100)], dtype=dtype)
        above = torch.nextafter(powers, torch.full_like(powers, math.inf))
        below = torch.nextafter(powers[1:], torch.zeros_like(powers[1:]))
        assert torch.equal(power_of_two_below(powers), powers)
        assert torch.equal(power_of_two_below(above), powers)
        assert torch.equal(power_of_two_below(below), powers[:-1])


def test_weights_for_some_micro_batches_and_weights_of_nothing_are_errors():
    with pytest.raises(TaskError, match=r"Tiny.train_step gave a weight for 1 of 2 micro-batches"):
        gradient([1.0, 1.0], [2.0, None], [1, 1])
    with pytest.raises(DataError, match=r"Tiny.train_step returned weight=0"):
        gradient([1.0, 1.0], [0, 0], [1, 1])
    with pytest.raises(DataError, match="nothing to train on"):
        gradient([1.0], [0.0], [1], combined=False)
