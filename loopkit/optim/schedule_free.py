"""Schedule-free optimizers: training and evaluation use different weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def schedule_free_optimizers(optimizers: Iterable[Optimizer]) -> list[Any]:
    """Return the optimizers that switch their weights by ``train()`` and ``eval()``."""
    return [
        optimizer
        for optimizer in optimizers
        if callable(getattr(optimizer, "train", None))
        and callable(getattr(optimizer, "eval", None))
    ]


@contextmanager
def evaluation_weights(optimizers: Iterable[Optimizer]) -> Iterator[dict[int, Tensor]]:
    """Give the parameters the weights of evaluation within the context.

    The optimizer's own way there and back rounds, so the run would depend on the number of
    evaluations. Therefore the weights of training are copied, and restored to the bit.

    Yields:
        The weights of training by the ``id`` of the parameter; empty if no optimizer switches.
    """
    switched = schedule_free_optimizers(optimizers)
    parameters = [
        p for optimizer in switched for group in optimizer.param_groups for p in group["params"]
    ]
    training = {id(p): p.detach().clone() for p in parameters}
    for optimizer in switched:
        optimizer.eval()
    try:
        yield training
    finally:
        for optimizer in switched:
            optimizer.train()
        with torch.no_grad():
            for parameter in parameters:
                parameter.copy_(training[id(parameter)])
