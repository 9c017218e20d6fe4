"""Running a model without a trace: its modes and the random state are as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loopkit import rng


@contextmanager
def preserved_modes(module: nn.Module, device: torch.device | None) -> Iterator[None]:
    """Restore the train or eval mode of each submodule, and the random state, after the block.

    Args:
        device: restore its generator too, if it is an accelerator.
    """
    modes = [(part, part.training) for part in module.modules()]
    state = rng.get_state(device)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        rng.set_state(state, device)
