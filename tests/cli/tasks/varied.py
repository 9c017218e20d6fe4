"""Tasks that differ in data, losses, weights and optimizers; each trains in well under a second."""

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from loopkit import StepLoop, Task
from loopkit.data import Loader, Padded
from loopkit.errors import DataError
from loopkit.optim import SGD, AdamW, ParamGroup, cosine, linear, reduce_on_plateau
from loopkit.rng import mix

CLASSES = 3
NAMES = ["a", "b"]
NAMES.append("c")  # a statement of its own that the script must keep


def make_points(count=100):
    """Points of CLASSES classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    if count < CLASSES:
        raise DataError("too few points")
    return x, x[:, :CLASSES].argmax(1)


class Classes(Task):
    """The least; its network has dropout and batch normalisation."""

    def __init__(self, hidden: int = 8, words: list[str] | None = None, rate: float = 0.1):
        super().__init__()
        self.rate, self.words = rate, words
        self.net = nn.Sequential(
            nn.Linear(6, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, len(NAMES)),
        )

    def train_step(self, batch):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/double", 2 * loss)
        return loss

    def eval_step(self, batch):
        return {"loss": self.train_step(batch)}

    def optimizers(self):
        return AdamW(lr=self.rate, schedule=cosine(warmup=3, floor=0.1))

    def train_data(self):
        return TensorDataset(*make_points())

    def eval_data(self):
        return TensorDataset(*make_points(20))


class Groups(Classes):
    """Its head has a rate and a decay of its own."""

    def optimizers(self):
        head = ParamGroup(r"^net\.4", lr=1e-2, weight_decay=0.2)
        return AdamW(lr=self.rate, weight_decay=0.1, groups=[head], schedule=linear("1 epoch"))


class Frozen(Classes):
    """Its first layer is frozen, and nothing decays but what a pattern names."""

    def configure_model(self):
        self.net[0].requires_grad_(False)
        self.more = nn.Linear(3, 3)

    def train_step(self, batch):
        return F.cross_entropy(self.more(self.net(batch[0])), batch[1])

    def optimizers(self):
        return SGD(lr=self.rate, momentum=0.9, weight_decay=0.1, no_decay=["bias"])


class Samples(Dataset):
    """Points one by one, each moved a little at random."""

    def __init__(self, how: str):
        self.points, self.how = make_points(), how

    def __len__(self):
        return len(self.points[0])

    def __getitem__(self, index):
        x = self.points[0][index]
        x = x + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * np.random.rand()
        if self.how == "dict":
            return {"x": x, "y": self.points[1][index], "name": str(index)}
        if self.how == "padded":
            return {"input_ids": list(range(1 + index % 7)), "y": self.points[1][index]}
        return x, self.points[1][index]


class Read(Classes):
    """Reads sample by sample, in one of several ways."""

    def __init__(self, how: str = "tuple"):
        super().__init__()
        self.how = how
        self.letters = nn.Embedding(8, 6)

    def train_step(self, batch):
        if not isinstance(batch, Mapping):
            return super().train_step(batch) + 0 * self.letters.weight.sum()
        x = batch["x"] if self.how == "dict" else self.letters(batch["input_ids"]).sum(1)
        noise = random.random() + np.random.rand()
        loss = F.cross_entropy(self.net(x), batch["y"])
        return {"loss": loss * noise + 0 * self.letters.weight.sum(), "noise": noise}

    def train_data(self):
        data = Samples(self.how)
        if self.how == "dict":
            return Loader(data, columns=["x", "y"], num_workers=2, batch_size=12)
        if self.how == "padded":
            return Loader(data, collate_fn=Padded(multiple_of=4), group_by_length=True)
        if self.how == "drawn":
            return Loader(data, weights=range(1, 101), length=70, drop_last=True)
        if self.how == "dataloader":
            return DataLoader(data, batch_size=10, shuffle=False)
        return data


class Weighted(Classes):
    """Its losses are means over the points of two classes, whose number is the weight."""

    def __init__(self, kind: str = "number"):
        super().__init__()
        self.kind = kind

    def train_step(self, batch):
        first = (batch[1] < 2).float()
        each = F.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        weight = first.sum() if self.kind == "tensor" else int(first.sum())
        return {"loss": (each * first).sum() / first.sum().clamp(min=1), "weight": weight}


class Own(Classes):
    """Makes torch's own optimizer and scheduler."""

    def optimizers(self):
        optimizer = torch.optim.NAdam(self.net.parameters(), lr=self.rate)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.95**step)


class Several(Classes):
    """Has two optimizers, of which one follows a schedule in epochs."""

    def optimizers(self):
        slow = AdamW(lr=0.1, params="bias", schedule=cosine(warmup="0.5 epochs"))
        return {"a": SGD(lr=0.1, params="weight", schedule=linear()), "b": slow}


class Twice(StepLoop):
    """Updates twice in a step, with new random numbers, and the second time with those of the first."""

    def run(self, run, batches):
        self.backward(run, batches, log=False)
        self.update(run)
        out = self.backward(run, batches, reuse_rng=len(batches) > 1)
        self.update(run)
        return out


class Repeated(Weighted):
    """Has a step of its own, in which batches weigh as many samples as they have."""

    def __init__(self, weighted: bool = False):
        super().__init__()
        self.weighted = weighted

    def loops(self):
        return {"step": Twice()}

    def train_step(self, batch):
        out = super().train_step(batch)
        return out if self.weighted else {"loss": out["loss"], "more": 1}


class Watches(StepLoop):
    """Asks the run for more than the script's has."""

    def run(self, run, batches):
        return super().run(run, batches) if run.progress.step else {}


class Watching(Classes):
    """Has that step."""

    def loops(self):
        return {"step": Watches()}


class Plateau(Classes):
    """Its rate follows a metric."""

    def optimizers(self):
        return SGD(lr=0.1, schedule=reduce_on_plateau())


class Streamed(Classes):
    """Its data is a list of batches."""

    def train_data(self):
        return [make_points(8)]


class Listening(Classes):
    """Listens to an event, with what the run gives it."""

    def on_step_end(self, run, out):
        self.rate = 0.99 * out["loss"]


class Recalls(Classes):
    """Reads its own arguments."""

    def train_step(self, batch):
        return super().train_step(batch) * self.hparams["rate"]


class Borrows(Classes):
    """Computes with a function of loopkit."""

    def train_data(self):
        return TensorDataset(*make_points(100 + mix(0) % 2))


SEED = 3


class Named(Classes):
    """Uses a name that the script has too."""

    def train_data(self):
        return TensorDataset(*make_points(100 + SEED))
