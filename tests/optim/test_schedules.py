"""Schedules: equal to the published formulas and to torch's own, step by step, on their own and in
real runs.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim import lr_scheduler

from loopkit import Checkpoint
from loopkit.durations import RunLength
from loopkit.errors import LoopkitWarning, MetricError, OptionError
from loopkit.optim import (
    SGD,
    AdamW,
    Schedule,
    bind,
    constant,
    cosine,
    cosine_restarts,
    inverse_sqrt,
    linear,
    one_cycle,
    polynomial,
    reduce_on_plateau,
    warm_restarts,
    wsd,
)
from tests.support import Tiny, quiet

TOTAL, WARMUP = 100, 13
LEFT = TOTAL - WARMUP


def ramp(formula):
    """A published formula of the steps since warmup, behind a linear warmup."""
    return lambda step: step / WARMUP if step < WARMUP else formula(step - WARMUP)


def published_wsd(kind):
    def formula(step):
        stable, decay = LEFT - 20, 20
        if step < stable:
            return 1.0
        part = (step - stable) / decay
        return {
            "linear": 1 - part,
            "cosine": (1 + math.cos(math.pi * part)) / 2,
            "1-sqrt": 1 - part**0.5,
        }[kind]

    return ramp(formula)


# The learning-rate schedules of transformers' documentation (optimizer_schedules), restated for
# these lengths.
PUBLISHED = {
    "constant": (constant(), lambda step: 1.0),
    "constant_with_warmup": (constant(WARMUP), ramp(lambda step: 1.0)),
    "linear": (linear(WARMUP), ramp(lambda step: 1 - step / LEFT)),
    "cosine": (cosine(WARMUP), ramp(lambda step: 0.5 + 0.5 * math.cos(math.pi * step / LEFT))),
    "two waves": (
        cosine(WARMUP, cycles=2),
        ramp(lambda step: 0.5 + 0.5 * math.cos(4 * math.pi * step / LEFT)),
    ),
    "cosine_with_min_lr": (
        cosine(WARMUP, floor=0.1),
        ramp(lambda s: 0.1 + 0.9 * (1 + math.cos(math.pi * s / LEFT)) / 2),
    ),
    "cosine_with_restarts": (
        cosine_restarts(WARMUP, cycles=3),
        ramp(
            lambda s: (1 + math.cos(math.pi * math.fmod(3 * s / LEFT, 1))) / 2 if s < LEFT else 0.0
        ),
    ),
    "polynomial": (
        polynomial(WARMUP, power=2, floor=0.01),
        ramp(lambda s: 0.99 * (1 - s / LEFT) ** 2 + 0.01),
    ),
    "inverse_sqrt": (inverse_sqrt(WARMUP), ramp(lambda s: 1 / math.sqrt((s + WARMUP) / WARMUP))),
    "inverse_sqrt, timescale": (
        inverse_sqrt(WARMUP, timescale=50),
        ramp(lambda s: 1 / math.sqrt((s + 50) / 50)),
    ),
    "inverse_sqrt, no warmup": (
        inverse_sqrt(),
        lambda step: 1 / math.sqrt((step + 10_000) / 10_000),
    ),
    "wsd": (wsd(WARMUP, decay=20), published_wsd("cosine")),
    "wsd linear": (wsd(WARMUP, decay="20%", shape="linear"), published_wsd("linear")),
    "wsd 1-sqrt": (wsd("13%", decay="1 epoch", shape="1-sqrt"), published_wsd("1-sqrt")),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_schedule_is_the_published_formula(name):
    schedule, formula = PUBLISHED[name]
    factor = schedule.resolve(RunLength(steps_per_epoch=20, steps=TOTAL))
    for step in range(TOTAL + 1):
        assert factor(step) == pytest.approx(formula(step), abs=1e-12), step


def torch_rates(make, steps=TOTAL):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


TORCH = {
    "warm restarts": (
        warm_restarts(T_0=10, T_mult=2, floor=0.05),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=2, eta_min=0.05),
    ),
    "even warm restarts": (
        warm_restarts(7),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=7),
    ),
    "one cycle": (
        one_cycle(),
        lambda o: lr_scheduler.OneCycleLR(o, 1.0, TOTAL, cycle_momentum=False),
    ),
    "another cycle": (
        one_cycle(pct_start=0.15, start=0.1, end=0.01),
        lambda o: lr_scheduler.OneCycleLR(
            o, 1.0, TOTAL, pct_start=0.15, div_factor=10, final_div_factor=10, cycle_momentum=False
        ),
    ),
    "polynomial": (polynomial(power=1.7), lambda o: lr_scheduler.PolynomialLR(o, TOTAL, power=1.7)),
    "linear": (linear(floor=0.2), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, TOTAL)),
    "cosine": (cosine(floor=0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.1)),
}


@pytest.mark.parametrize("name", TORCH)
def test_a_schedule_is_torchs_own(name):
    schedule, make = TORCH[name]
    factor = schedule.resolve(RunLength(steps=TOTAL))
    assert [factor(step) for step in range(TOTAL)] == pytest.approx(torch_rates(make), abs=1e-12)


class Scheduled(Tiny):
    """Tiny with plain SGD on a schedule."""

    def __init__(self, schedule, lr=1.0) -> None:
        super().__init__(count=64, dropout=0.0)
        self.schedule, self.lr = schedule, lr

    def optimizers(self):
        return SGD(lr=self.lr, momentum=0.9, schedule=self.schedule)


def rates_of(task, **options):
    """The rate that each step was taken with."""
    rates = []
    fit = quiet(**options)
    fit.on("step_end", lambda run, out: rates.append(run.optimizers["main"].param_groups[0]["lr"]))
    fit.run(task)
    return rates


@pytest.mark.parametrize(
    ("warmup", "steps"), [(4, 4), ("25%", 4), ("0.5 epochs", 4), ("1 epoch", 8)]
)
def test_warmup_in_steps_percent_and_epochs(warmup, steps):
    rates = rates_of(Scheduled(linear(warmup), lr=0.1), batch_size=8, epochs=2)
    expected = [0.1 * (n / steps if n < steps else (16 - n) / (16 - steps)) for n in range(16)]
    assert rates == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("accumulate", [1, 2, 4, 8])
def test_rates_are_the_same_at_any_accumulation(accumulate):
    schedule = wsd(warmup="10%", decay="50%")
    rates = rates_of(
        Scheduled(schedule, 0.01), batch_size=16 // accumulate, global_batch_size=16, epochs=5
    )
    factor = schedule.resolve(RunLength(steps=20))
    assert rates == [0.01 * factor(step) for step in range(20)]


def test_a_schedule_can_be_swapped_during_a_run():
    rates = []
    fit = quiet(batch_size=8, epochs=2)

    @fit.on("step_end")
    def swap(run, out):
        rates.append(run.optimizers["main"].param_groups[0]["lr"])
        if run.progress.step == 6:
            run.schedules["main"] = bind(constant(), run.optimizers["main"], run.length)
        if run.progress.step == 9:
            run.schedules["main"] = bind(linear(), run.optimizers["main"], run.length)

    fit.run(Scheduled(linear(), lr=0.1))
    assert rates == pytest.approx(
        [0.1 * ((16 - n) / 16 if n < 6 or n >= 9 else 1.0) for n in range(16)], abs=1e-15
    )


class Falling(Scheduled):
    """Its evaluations give these losses."""

    def __init__(self, schedule, losses) -> None:
        super().__init__(schedule, 0.1)
        self.losses, self.evaluations = losses, 0

    def eval_step(self, batch):
        step = self.evaluations
        self.evaluations += 1
        return {"loss": torch.tensor(self.losses[step], dtype=torch.float64)}


LOSSES = [5.0, 4.0, 4.1, 4.2, 4.3, 3.0, 3.1, 3.1, 2.9999, 3.1, 3.1, 3.1, 2.0, 2.1, 2.2, 2.3]


def test_reduce_on_plateau_is_torchs_own():
    task = Falling(
        reduce_on_plateau("eval/loss:min", factor=0.3, patience=1, cooldown=1, floor=0.02), LOSSES
    )
    rates = rates_of(task, batch_size=8, epochs=2, eval_every=1, eval_batch_size=20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.3, patience=1, cooldown=1, min_lr=0.002
    )
    expected = []
    for loss in LOSSES:
        expected.append(optimizer.param_groups[0]["lr"])
        theirs.step(loss)
    assert rates == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 3


def test_reduce_on_plateau_resumes_where_it_was(tmp_path):
    def part(stop, start):
        task = Falling(reduce_on_plateau(factor=0.3, patience=1, cooldown=1, warmup=3), LOSSES)
        task.evaluations = start
        save = Checkpoint(every="1000 steps", background=False)
        rates = []
        fit = quiet(
            batch_size=8,
            epochs=2,
            eval_every=1,
            eval_batch_size=20,
            run_dir=tmp_path / run,
            resume="auto",
            checkpoint=save,
        )

        @fit.on("step_end")
        def note(r, out):
            rates.append(r.optimizers["main"].param_groups[0]["lr"])
            if r.progress.step == stop:
                r.stop("test")

        fit.run(task)
        return rates

    run = "whole"
    whole = part(None, 0)
    assert whole[:3] == pytest.approx([0.0, 0.1 / 3, 0.2 / 3])
    for stop in range(1, 16):
        run = str(stop)
        assert part(stop, 0) + part(None, stop) == whole


def test_the_metric_of_a_plateau_must_be_there():
    with pytest.raises(
        MetricError,
        match=r"reduce_on_plateau\('eval/los:min'\): .* Did you mean 'eval/loss'",
    ):
        quiet(batch_size=32).run(Scheduled(reduce_on_plateau("eval/los:min")))


@pytest.mark.parametrize("own", [True, False])
def test_a_plateau_without_evaluations_is_refused(own):
    task = Scheduled(reduce_on_plateau())
    if not own:
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        task.optimizers = lambda: (optimizer, lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(
        OptionError, match="a schedule watches 'eval/loss' and nothing is evaluated"
    ):
        quiet(eval_every="never").run(task)


def test_a_longer_horizon_on_resume_is_said(tmp_path):
    save = Checkpoint(background=False)
    quiet(batch_size=8, epochs=1, run_dir=tmp_path, checkpoint=save).run(Scheduled(linear(), 0.1))
    with pytest.warns(
        LoopkitWarning, match="'linear' was made for a run of 8 steps and now for one of 16"
    ):
        rates = rates_of(
            Scheduled(linear(), 0.1),
            batch_size=8,
            epochs=2,
            run_dir=tmp_path,
            checkpoint=save,
            resume="auto",
        )
    assert rates == pytest.approx([0.1 * (16 - n) / 16 for n in range(8, 16)])


@pytest.mark.parametrize(
    ("schedule", "lr", "said"),
    [
        (
            constant(),
            0.1,
            "the schedule was 'inverse_sqrt' when this checkpoint was saved and is now 'constant'",
        ),
        (reduce_on_plateau(), 0.1, "is now 'reduce_on_plateau'"),
        (inverse_sqrt(), 0.2, "base learning rates were 0.1, 0.1 .* are now 0.2, 0.2"),
    ],
)
def test_another_schedule_or_rate_on_resume_is_said(tmp_path, schedule, lr, said):
    class Decaying(Scheduled):
        def optimizers(self):
            return AdamW(lr=self.lr, schedule=self.schedule)

    save = Checkpoint(background=False)
    quiet(steps=3, run_dir=tmp_path, checkpoint=save).run(Decaying(inverse_sqrt(), 0.1))
    with pytest.warns(LoopkitWarning, match=said):
        rates = rates_of(
            Decaying(schedule, lr), steps=6, run_dir=tmp_path, checkpoint=save, resume="auto"
        )
    assert rates == pytest.approx(
        [lr * (1 / math.sqrt(1 + n / 1e4) if lr == 0.2 else 1.0) for n in range(3, 6)]
    )


def test_a_longer_horizon_is_not_mentioned_where_it_changes_nothing(tmp_path):
    save = Checkpoint(background=False)  # warnings of loopkit's are errors in this suite
    quiet(steps=3, run_dir=tmp_path, checkpoint=save).run(Scheduled(inverse_sqrt(5), 0.1))
    quiet(steps=6, run_dir=tmp_path, checkpoint=save, resume="auto").run(
        Scheduled(inverse_sqrt(5), 0.1)
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: wsd(shape="square"),
            r"wsd\(shape='square'\) is not known: give one of 'linear', 'cosine', '1-sqrt'",
        ),
        (lambda: wsd(decay="a bit"), r"wsd\(decay='a bit'\) is not a duration"),
        (
            lambda: cosine(floor=2),
            r"cosine\(floor=2\): give a factor of the base rate of at least 0 and of at most 1",
        ),
        (
            lambda: cosine_restarts(cycles=0),
            r"cosine_restarts\(cycles=0\): give a number of at least 1",
        ),
        (lambda: warm_restarts(10, T_mult=0.5), r"warm_restarts\(T_mult=0.5\)"),
        (lambda: one_cycle(pct_start=1.5), r"one_cycle\(pct_start=1.5\)"),
        (lambda: polynomial(power=-1), r"polynomial\(power=-1\)"),
        (
            lambda: reduce_on_plateau("eval/loss"),
            r"reduce_on_plateau\(metric='eval/loss'\): give the name of the metric and its mode",
        ),
        (
            lambda: reduce_on_plateau(factor=1.5),
            r"reduce_on_plateau\(factor=1.5\): give a number above 0 and below 1",
        ),
        (lambda: reduce_on_plateau(patience=-1), r"reduce_on_plateau\(patience=-1\)"),
        (
            lambda: SGD(lr=0.1, schedule="cosine_with_restarts"),
            r"give a schedule of loopkit.optim, as schedule=cosine_restarts\(cycles=...\)",
        ),
        (
            lambda: cosine("1 min").resolve(RunLength(steps=3)),
            r"cosine\(warmup='60 seconds'\): give steps, epochs of data with a length, or percent",
        ),
        (lambda: cosine().resolve(RunLength()), "'cosine' needs to know where the run ends"),
    ],
)
def test_a_bad_value_is_an_error_that_names_it(make, said):
    with pytest.raises(OptionError, match=said):
        make()


def test_a_schedule_of_ones_own():
    halving = Schedule(
        "halving", lambda step, total: 0.5 ** (step // 4), warmup=2, needs_total=False
    )
    assert rates_of(Scheduled(halving, 0.8), batch_size=8) == pytest.approx(
        [0, 0.4, 0.8, 0.8, 0.8, 0.8, 0.4, 0.4]
    )
