"""A task for the tests of the command line: two classes of points, in well under a second."""

import os
import time

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from loopkit import Hook, StepLoop, Task
from loopkit.optim import SGD


class Shout(Hook):
    """Says a word when training starts.

    Args:
        word: what is said.
        times: how often.
    """

    def __init__(self, word: str = "hey", times: int = 1):
        self.word, self.times = word, times

    def on_fit_start(self, run):
        print(" ".join([self.word] * self.times))


class LoudStep(StepLoop):
    def run(self, run, *args):
        print("step", run.progress.step + 1)
        return super().run(run, *args)


def points(count=64):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, (x.sum(1) > 0).long())


class Base(nn.Module):
    """Not a task."""


class Points(Task):
    """Tells points above a plane from those below.

    Args:
        hidden: width of the hidden layer.
        lr: the learning rate.
        seed: of the weights.
        names: labels, for nothing.
        bias: whether the layers have one.
        pause: seconds to sleep at each step.
    """

    def __init__(
        self,
        hidden: int = 8,
        lr: float = 0.1,
        seed: int = 3,
        names: list[str] | None = None,
        bias: bool = True,
        pause: float = 0.0,
        momentum=0.9,
        form: str = "class",
    ):
        super().__init__()
        torch.manual_seed(seed)
        self.lr, self.pause, self.momentum, self.form = lr, pause, momentum, form
        self.net = nn.Sequential(
            nn.Linear(4, hidden, bias=bias), nn.ReLU(), nn.Linear(hidden, 2, bias=bias)
        )

    def train_step(self, batch):
        time.sleep(self.pause)
        if "POINTS_READY" in os.environ:
            with open(os.environ["POINTS_READY"], "w") as file:
                file.write("training")
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def eval_step(self, batch):
        return {"loss": F.cross_entropy(self.net(batch[0]), batch[1])}

    def predict_step(self, batch):
        logits = self.net(batch[0])
        if self.form == "named":
            return {"class": logits.argmax(-1), "logits": logits}
        if self.form == "words":
            return ["above" if above else "be\nlow" for above in logits.argmax(-1)]
        return logits if self.form == "logits" else logits.argmax(-1)

    def optimizers(self):
        return SGD(lr=self.lr, momentum=self.momentum)

    def train_data(self):
        return points()

    def eval_data(self):
        return points()

    def test_data(self):
        return points(24)
