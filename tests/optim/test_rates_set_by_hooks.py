"""A learning rate that a hook sets: it holds where there is no schedule, and is refused where one
would undo it.
"""

from __future__ import annotations

import pytest
import torch
from torch.optim import lr_scheduler

from loopkit import Checkpoint
from loopkit.errors import OptionError
from loopkit.optim import SGD, bind, constant, linear, reduce_on_plateau
from tests.support import Tiny, quiet


class Rated(Tiny):
    def __init__(self, make):
        super().__init__(count=24, dropout=0.0)
        self.make = make

    def optimizers(self):
        return self.make(self)


def rates(make, event, action, **options):
    """The rate that each of six steps has used, where ``action`` is called at ``event``."""
    found = []
    fit = quiet(**{"steps": 6, "batch_size": 8} | options)
    fit.on(event, lambda run, *rest: action(run))

    @fit.on("step_end")
    def note(run, out):
        found.append(run.optimizers["main"].param_groups[0]["lr"])

    fit.run(Rated(make))
    return found


def sets(rate, at):
    def action(run):
        if run.progress.step == at:
            run.optimizers["main"].param_groups[0]["lr"] = rate

    return action


@pytest.mark.parametrize("event", ["step_start", "before_update", "micro_step_end"])
def test_without_a_schedule_a_rate_holds(event):
    found = rates(lambda task: SGD(lr=0.1), event, sets(0.02, 3))
    assert found == [0.1] * 3 + [0.02] * 3


@pytest.mark.parametrize("event", ["step_start", "before_update", "step_end", "fit_start"])
@pytest.mark.parametrize("schedule", [constant(), linear(), reduce_on_plateau()])
def test_with_a_schedule_a_rate_is_refused(event, schedule):
    at = 0 if event == "fit_start" else 3
    with pytest.raises(OptionError, match=r"set to 0.02 before step \d, and the schedule '"):
        rates(lambda task: SGD(lr=0.1, schedule=schedule), event, sets(0.02, at))


def test_a_hook_takes_over_by_replacing_the_schedule():
    def action(run):
        if run.progress.step == 3:
            optimizer = run.optimizers["main"]
            for group in optimizer.param_groups:
                group["initial_lr"] = 0.02
            run.schedules["main"] = bind(constant(), optimizer, run.length)

    found = rates(lambda task: SGD(lr=0.1, schedule=linear()), "step_start", action)
    assert found[2:] == pytest.approx([0.1 * 4 / 6, 0.02, 0.02, 0.02])


def test_a_scheduler_of_torch_treats_a_rate_as_in_a_loop_by_hand():
    def make(task):
        optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
        return optimizer, {
            "scheduler": lr_scheduler.ExponentialLR(optimizer, 0.5),
            "interval": "step",
        }

    found = rates(make, "step_start", sets(0.8, 3))
    assert found == pytest.approx([0.05, 0.025, 0.0125, 0.4, 0.2, 0.1])


def test_a_resume_takes_no_rate_for_one_that_a_hook_set(tmp_path):
    options = {"run_dir": tmp_path, "checkpoint": Checkpoint(background=False), "resume": "auto"}

    def make(task):
        return SGD(lr=0.1, schedule=linear(warmup=3))

    whole = rates(make, "commit", lambda run: None)
    first = rates(make, "step_end", lambda run: run.progress.step == 2 and run.stop("x"), **options)
    assert first + rates(make, "commit", lambda run: None, **options) == whole
