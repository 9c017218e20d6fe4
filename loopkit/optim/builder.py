"""The optimizers of a task and their schedules, built from what ``Task.optimizers()`` returned."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from loopkit.errors import TaskError
from loopkit.optim.groups import check_complete
from loopkit.optim.lr_schedulers import BoundSchedule, bind
from loopkit.optim.returned import named_pairs
from loopkit.optim.schedule_free import schedule_free_optimizers
from loopkit.optim.specs import OptimizerSpec
from loopkit.task import name_of

if TYPE_CHECKING:
    from loopkit.run import Run


def make_optimizers(task: Any, run: Run | None = None) -> dict[str, tuple[Optimizer, Any]]:
    """Build what ``task.optimizers()`` returned.

    Args:
        task: the task.
        run: is given to a method that takes an argument, ``def optimizers(self, run)``.

    Returns:
        Each optimizer with its schedule or None, by name; a single one is called "main".

    Raises:
        TaskError: it returned something else, or a trainable parameter is in no group.
        OptionError: a spec cannot be built.
    """
    made: dict[str, tuple[Optimizer, Any]] = {}
    where = f"{name_of(task)}.optimizers()"
    taken = inspect.signature(task.optimizers).parameters
    if taken and run is None:
        raise TaskError(f"{where} takes the run, and there is none: give the optimizers themselves")
    returned = task.optimizers(run) if taken else task.optimizers()
    for name, (optimizer, schedule) in named_pairs(returned, where).items():
        if isinstance(optimizer, OptimizerSpec):
            made[name] = optimizer.build(task), schedule or optimizer.schedule
        else:
            made[name] = optimizer, schedule
    check_complete(task, {name: optimizer for name, (optimizer, _) in made.items()})
    return made


def build_optimizers(run: Run) -> tuple[dict[str, Optimizer], dict[str, BoundSchedule]]:
    """Return the optimizers and the bound schedules of a run's task by name, ready to train.

    Raises:
        TaskError: ``task.optimizers()`` returned something else, or a parameter is in no group.
        OptionError: a spec cannot be built, or its schedule needs a length of the run that is not
            known.
    """
    made = make_optimizers(run.task, run)
    optimizers = {name: optimizer for name, (optimizer, _) in made.items()}
    for optimizer in schedule_free_optimizers(optimizers.values()):
        optimizer.train()
    schedules = {
        name: bind(schedule, made[name][0], run.length)
        for name, (_, schedule) in made.items()
        if schedule
    }
    return optimizers, schedules
