"""Jobs of single tests that need a task of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loopkit import DDP
from loopkit.hooks import Unfreeze
from tests.support import Tiny, digest, quiet


def unfreeze() -> dict[str, Any]:
    """Train with the first layer frozen until step 3."""
    task = Tiny(dropout=0.0)
    before = task.net[0].weight.detach().clone()
    quiet(strategy="ddp", batch_size=8, epochs=2, hooks=[Unfreeze({3: r"net\.0"})]).run(task)
    return {"digest": digest(task.state_dict()), "moved": not torch.equal(before, task.net[0].weight)}


class Idle(Tiny):
    """Has a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)


def unused() -> str:
    """What the error says; the option it names works."""
    told = ""
    try:
        quiet(strategy="ddp", batch_size=8).run(Idle())
    except Exception as error:
        told = str(error)
    quiet(strategy=DDP(find_unused_parameters=True), batch_size=8).run(Idle())
    return told
