"""Schedules beside those of ``transformers.get_scheduler``, as the Trainer takes them by name."""

from __future__ import annotations

import pytest
import torch

from loopkit.durations import RunLength
from loopkit.optim import (
    constant,
    cosine,
    cosine_restarts,
    inverse_sqrt,
    linear,
    polynomial,
    reduce_on_plateau,
    wsd,
)
from tests.optim.test_schedules import LOSSES, Falling, rates_of

get_scheduler = pytest.importorskip("transformers").get_scheduler

TOTAL, LR = 100, 0.05
# Their name and arguments, and what is the same here with a warmup of w steps.
SAME = {
    "linear": ("linear", {}, linear),
    "cosine": ("cosine", {}, cosine),
    "cosine, two waves": ("cosine", {"num_cycles": 2}, lambda w: cosine(w, cycles=2)),
    "cosine_with_restarts": (
        "cosine_with_restarts",
        {"num_cycles": 3},
        lambda w: cosine_restarts(w, cycles=3),
    ),
    "polynomial": ("polynomial", {}, lambda w: polynomial(w, floor=1e-7 / LR)),
    "polynomial, squared": (
        "polynomial",
        {"power": 2, "lr_end": 0.01},
        lambda w: polynomial(w, power=2, floor=0.2),
    ),
    "constant": ("constant", {}, lambda w: constant()),
    "constant_with_warmup": ("constant_with_warmup", {}, constant),
    "inverse_sqrt": ("inverse_sqrt", {}, inverse_sqrt),
    "inverse_sqrt, timescale": (
        "inverse_sqrt",
        {"timescale": 40},
        lambda w: inverse_sqrt(w, timescale=40),
    ),
    "cosine_with_min_lr": ("cosine_with_min_lr", {"min_lr": 0.005}, lambda w: cosine(w, floor=0.1)),
    "cosine_with_min_lr, rate": (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.3},
        lambda w: cosine(w, floor=0.3),
    ),
    "warmup_stable_decay": (
        "warmup_stable_decay",
        {"num_decay_steps": 20},
        lambda w: wsd(w, decay=20),
    ),
    "warmup_stable_decay, floor": (
        "warmup_stable_decay",
        {"num_decay_steps": 30, "decay_type": "linear", "min_lr_ratio": 0.2},
        lambda w: wsd(w, decay="30%", shape="linear", floor=0.2),
    ),
    "warmup_stable_decay, 1-sqrt": (
        "warmup_stable_decay",
        {"num_decay_steps": 20, "decay_type": "1-sqrt"},
        lambda w: wsd(w, decay=20, shape="1-sqrt"),
    ),
}


@pytest.mark.parametrize("warmup", [0, 13])
@pytest.mark.parametrize("name", SAME)
def test_a_schedule_is_the_one_that_the_trainer_calls_so(name, warmup):
    theirs, arguments, ours = SAME[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = get_scheduler(theirs, optimizer, warmup, TOTAL, scheduler_specific_kwargs=arguments)
    factor = ours(warmup).resolve(RunLength(steps=TOTAL))
    for step in range(TOTAL):
        assert LR * factor(step) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=0, abs=1e-12
        ), step
        optimizer.step()
        scheduler.step()


def test_reduce_on_plateau_is_reduce_lr_on_plateau():
    task = Falling(reduce_on_plateau(factor=0.3, patience=1, floor=0.02), LOSSES)
    rates = rates_of(task, batch_size=8, epochs=2, eval_every=1, eval_batch_size=20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    arguments = {"factor": 0.3, "patience": 1, "min_lr": 0.002}
    scheduler = get_scheduler(
        "reduce_lr_on_plateau", optimizer, scheduler_specific_kwargs=arguments
    )
    expected = []
    for loss in LOSSES:
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    assert rates == pytest.approx(expected, rel=0, abs=1e-12)
    assert len(set(expected)) > 3


def test_every_name_of_the_trainer_is_compared_or_listed():
    from tests.docs.pages import DOCS

    told = (DOCS / "optimizers.md").read_text(encoding="utf-8")
    names = {each.value for each in pytest.importorskip("transformers").SchedulerType}
    compared = {theirs for theirs, _, _ in SAME.values()} | {"reduce_lr_on_plateau"}
    assert {name for name in names if name not in told} == set()
    assert names - compared == {"cosine_warmup_with_min_lr", "greedy"}
