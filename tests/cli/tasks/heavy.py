"""A task with known memory: a few large layers, many activations; and one that fails on demand."""

import os
import signal
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from loopkit import Task
from loopkit.optim import SGD, AdamW


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x):
        y = self.layer(x)
        for _ in range(8):
            y = F.gelu(y)
        return x + y


class Heavy(Task):
    def __init__(self, width: int = 1024, depth: int = 4, rows: int = 4, adam: bool = True):
        super().__init__()
        self.width, self.rows, self.adam = width, rows, adam
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def train_step(self, batch):
        return self.blocks(batch[0].expand(-1, self.width)).square().mean()

    def optimizers(self):
        return AdamW(lr=1e-4) if self.adam else SGD(lr=1e-4)

    def train_data(self):
        return TensorDataset(torch.ones(self.rows, 1))


class Failing(Heavy):
    def __init__(self, how: str = ""):
        super().__init__(width=8)
        if how == "raise":
            raise ValueError("no such way")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            os._exit(3)
        if how == "hang":
            time.sleep(60)

    def on_step_end(self, run, out):
        if self.hparams["how"] == "stop" and run.progress.step == 2:
            run.stop("enough")
