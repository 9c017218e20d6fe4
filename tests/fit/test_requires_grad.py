"""What a task freezes and frees by hand during a run: it learns, or an error names it at that step;
and a resume restores it.
"""

from __future__ import annotations

import copy

import pytest
import torch

from loopkit import Checkpoint
from loopkit.errors import TaskError
from loopkit.hooks import Unfreeze
from loopkit.optim import SGD, AdamW, Muon, build
from tests.support import Tiny, quiet


class Freezing(Tiny):
    """Freezes or frees its first layer at ``at``, once; and starts with it frozen if ``frozen``."""

    def __init__(self, make, frozen=True, at=4, frees=True):
        super().__init__(count=40, dropout=0.0)
        self.make, self.at, self.frees = make, at, frees
        self.net[0].requires_grad_(not frozen)

    def on_step_start(self, run, batches):
        if run.progress.step == self.at:
            self.net[0].requires_grad_(self.frees)

    def optimizers(self):
        return self.make(self)


def over_all(task):
    return torch.optim.AdamW(task.parameters(), lr=0.05)


def over_free(task):
    return torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.05)


@pytest.mark.parametrize(
    "make", [lambda task: AdamW(lr=0.05), over_free, lambda task: build("lion")]
)
def test_a_parameter_that_is_freed_and_in_no_group_is_named_at_that_step(make):
    steps = []
    fit = quiet(epochs=2, batch_size=8)
    fit.on("step_start", lambda run, batches: steps.append(run.progress.step))
    task = Freezing(make)
    with pytest.raises(
        TaskError, match=r"Freezing\.net\.0\.(weight|bias) has a gradient and is in no"
    ):
        fit.run(task)
    assert steps[-1] == 4
    # Nothing is left on the task: a loop by hand may train it.
    task.train_step(next(iter(torch.utils.data.DataLoader(task.train_data(), 8)))).backward()
    assert task.net[0].weight.grad is not None


def test_a_group_that_comes_during_the_run_is_refused_as_no_resume_has_it():
    def add(run, batches):
        if run.progress.step == 2:
            layer = run.task.net[0].requires_grad_(True)
            run.optimizers["main"].add_param_group({"params": list(layer.parameters())})

    fit = quiet(epochs=2, batch_size=8)
    fit.on("step_start", add)
    with pytest.raises(TaskError, match=r"net\.0\.\w+ came into a parameter group after"):
        fit.run(Freezing(over_free, at=None))


def test_a_frozen_parameter_without_a_gradient_costs_nothing_and_is_left_alone():
    task = Freezing(lambda task: AdamW(lr=0.05), at=None)
    before = copy.deepcopy(task.net[0].state_dict())
    quiet(epochs=2, batch_size=8).run(task)
    assert all(torch.equal(value, before[name]) for name, value in task.net[0].state_dict().items())
    assert not task.net[0].weight.requires_grad


@pytest.mark.parametrize(
    ("frozen", "frees", "make"),
    [
        (True, True, over_all),
        (False, False, over_all),
        (False, False, lambda task: AdamW(lr=0.05)),
        (False, False, lambda task: SGD(lr=0.05, momentum=0.9)),
    ],
)
def test_a_resume_restores_requires_grad(tmp_path, frozen, frees, make):
    def part(run_dir, stop=None):
        task = Freezing(make, frozen, frees=frees)
        fit = quiet(
            epochs=2,
            batch_size=8,
            run_dir=tmp_path / run_dir,
            resume="auto",
            checkpoint=Checkpoint(background=False),
        )
        fit.on("step_end", lambda run, out: run.stop("x") if run.progress.step == stop else None)
        fit.run(task)
        return task

    whole = part("whole")
    assert whole.net[0].weight.requires_grad is frees
    for stop in (3, 4, 5, 8):
        part(str(stop), stop)
        task = part(str(stop))
        assert task.net[0].weight.requires_grad is frees
        assert all(torch.equal(a, b) for a, b in zip(task.parameters(), whole.parameters()))


def test_a_run_resumed_without_unfreeze_trains_everything(tmp_path):
    options = {"batch_size": 8, "run_dir": tmp_path, "checkpoint": Checkpoint(background=False)}
    quiet(steps=3, hooks=[Unfreeze({8: r"net\.0"})], **options).run(
        Freezing(over_all, False, at=None)
    )
    task = Freezing(over_all, False, at=None)
    quiet(steps=6, resume="auto", **options).run(task)
    assert task.net[0].weight.requires_grad


OPTIMIZERS = {
    "adamw": lambda task: AdamW(lr=0.05),
    "adam": lambda task: build("adam", lr=0.05),
    "sgd": lambda task: SGD(lr=0.05),
    "momentum": lambda task: SGD(lr=0.05, momentum=0.9),
    "nesterov": lambda task: SGD(lr=0.05, momentum=0.9, nesterov=True),
    "dampening": lambda task: build("sgd", lr=0.05, momentum=0.9, dampening=0.1),
    "adagrad": lambda task: build("adagrad"),
    "rmsprop": lambda task: build("rmsprop", momentum=0.9),
    "nadam": lambda task: build("nadam"),
    "radam": lambda task: build("radam"),
    "adafactor": lambda task: build("adafactor"),
    "lion": lambda task: build("lion"),
    "kahan": lambda task: build("adamw_bf16"),
    "rprop": lambda task: build("torch.optim.Rprop", lr=0.01),
    "adamax": lambda task: build("torch.optim.Adamax"),
    "by hand": lambda task: torch.optim.SGD(task.parameters(), lr=0.05, momentum=0.9, fused=True),
    "muon": lambda task: Muon(lr=0.01, params=r"net\.[03]"),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_unfreeze_works_with_every_optimizer_and_resumes(name, tmp_path):
    def part(run_dir, stop=None):
        task = Freezing(OPTIMIZERS[name], frozen=False, at=None)
        fit = quiet(
            epochs=2,
            batch_size=8,
            hooks=[Unfreeze({4: r"net\.0"})],
            run_dir=tmp_path / run_dir,
            resume="auto",
            checkpoint=Checkpoint(background=False),
        )
        fit.on("step_end", lambda run, out: run.stop("x") if run.progress.step == stop else None)
        fit.run(task)
        return task.state_dict()

    start, whole = Tiny(count=40, dropout=0.0).state_dict(), part("whole")
    assert not any(torch.equal(value, start[n]) for n, value in whole.items())
    for stop in (4, 6):
        part(str(stop), stop)
        assert all(torch.equal(value, whole[n]) for n, value in part(str(stop)).items())
