"""Optimizers that train with other weights than they give: those with ``train()`` and ``eval()``
(schedule-free).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def schedule_free_optimizers(optimizers: Iterable[Optimizer]) -> list[Any]:
    """Those that have ``train()`` and ``eval()``."""
    return [
        o
        for o in optimizers
        if callable(getattr(o, "train", None)) and callable(getattr(o, "eval", None))
    ]


@contextmanager
def evaluation_weights(optimizers: Iterable[Optimizer]) -> Iterator[dict[int, Tensor]]:
    """Inside, parameters hold the weights to evaluate and to keep; afterwards, bit for bit, those
    to train on with.

    Going there and back by the optimizer's own arithmetic would round, and the run would depend on
    how often it was looked at; so the weights to train on with are set aside. Yields them by the
    parameter's ``id``: nothing where no optimizer switches.
    """
    given = schedule_free_optimizers(optimizers)
    parameters = [
        p for optimizer in given for group in optimizer.param_groups for p in group["params"]
    ]
    aside = {id(p): p.detach().clone() for p in parameters}
    for optimizer in given:
        optimizer.eval()
    try:
        yield aside
    finally:
        for optimizer in given:
            optimizer.train()
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(aside[id(parameter)])
