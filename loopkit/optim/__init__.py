"""Optimizers by name, their parameter groups, and learning-rate schedules."""

from loopkit.foreign_values import missing_attribute
from loopkit.optim.factory import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    AdamW8bit,
    AdamWBf16,
    Lion,
    Muon,
    RMSprop,
    ScheduleFree,
    build,
)
from loopkit.optim.groups import ParamGroup
from loopkit.optim.lr_schedulers import bind
from loopkit.optim.schedules import (
    Plateau,
    Schedule,
    constant,
    cosine,
    cosine_restarts,
    inverse_sqrt,
    linear,
    multi_step,
    one_cycle,
    polynomial,
    reduce_on_plateau,
    step_decay,
    warm_restarts,
    wsd,
)
from loopkit.optim.specs import OptimizerSpec
from loopkit.optim.tabulate import group_table

__all__ = [
    "SGD", "Adafactor", "Adagrad", "Adam", "AdamW", "AdamW8bit", "AdamWBf16", "ParamGroup", "Lion", "Muon", "Plateau",
    "RMSprop", "Schedule", "ScheduleFree", "OptimizerSpec", "bind", "build", "constant", "cosine", "cosine_restarts",
    "group_table", "inverse_sqrt", "linear", "multi_step", "one_cycle", "polynomial", "reduce_on_plateau", "step_decay",
    "warm_restarts", "wsd",
]  # fmt: skip


def __getattr__(name: str) -> object:
    raise missing_attribute("loopkit.optim", name)
