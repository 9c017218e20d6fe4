"""A small task, and a hook that ends its run as a crash does, for loggers of resumed runs."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import TensorDataset

from loopkit import Hook, Task
from loopkit.optim import SGD


class Line(Task):
    def __init__(self, width: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(2, width)

    def train_step(self, batch):
        return self.layer(batch[0]).square().mean()

    def eval_step(self, batch):
        return {"loss": self.train_step(batch)}

    def optimizers(self):
        return SGD(lr=0.01)

    def train_data(self):
        return TensorDataset(torch.arange(40.0).reshape(20, 2) / 40)

    def eval_data(self):
        return self.train_data()


class Fails(Hook):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_commit(self, run):
        if run.progress.step == self.step:
            raise RuntimeError("the machine went down")
