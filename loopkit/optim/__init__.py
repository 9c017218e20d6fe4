"""Optimizers by name, with groups that spare biases and norms; schedules as functions of (step,
total).
"""

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
from loopkit.optim.groups import Group
from loopkit.optim.lr_schedulers import bind
from loopkit.optim.schedules import (
    Plateau,
    Schedule,
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
from loopkit.optim.specs import Spec
from loopkit.optim.table import group_table

__all__ = [
    "SGD", "Adafactor", "Adagrad", "Adam", "AdamW", "AdamW8bit", "AdamWBf16", "Group", "Lion", "Muon", "Plateau",
    "RMSprop", "Schedule", "ScheduleFree", "Spec", "bind", "build", "constant", "cosine", "cosine_restarts",
    "group_table", "inverse_sqrt", "linear", "one_cycle", "polynomial", "reduce_on_plateau", "warm_restarts", "wsd",
]  # fmt: skip
