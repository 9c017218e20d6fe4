"""Tasks of the contract tests, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from loopkit import Loader, StepLoop, Task
from loopkit.optim import AdamW, cosine
from tests.contract.measured import Measured
from tests.support import Noisy, Tiny, points


class TokenClassifier(Task):
    """Token classification with ignored labels; the weight is the number of labels that count."""

    def __init__(self, count: int = 52, dropout: float = 0.1, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.count = count
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([Block(width, dropout) for _ in range(2)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def train_step(self, batch: Any) -> Any:
        x, y = batch["input_ids"], batch["labels"]
        loss = F.cross_entropy(self(x).flatten(0, 1), y.flatten(), ignore_index=-100)
        return {"loss": loss, "weight": (y != -100).sum()}

    def eval_step(self, batch: Any) -> dict[str, Any]:
        return self.train_step(batch)

    def predict_step(self, batch: Any) -> torch.Tensor:
        return self(batch["input_ids"]).argmax(-1)

    def optimizers(self) -> Any:
        return AdamW(lr=1e-2, schedule=cosine(warmup=2))

    def train_data(self) -> Any:
        return Sentences(self.count)

    def eval_data(self) -> Any:
        return Sentences(21, seed=7)


class Block(nn.Module):
    """A residual block of a class of its own, which automatic wrapping finds."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Sentences(torch.utils.data.Dataset):
    """Random token ids with a learnable rule; about a third of the labels are ignored."""

    def __init__(self, count: int, seed: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, 11, (count, 6), generator=generator)
        self.labels = (self.ids * 3) % 5
        self.labels[torch.rand(count, 6, generator=generator) < 0.3] = -100

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


class Kinds(Tiny):
    """Tiny on several kinds of data."""

    def __init__(self, kind: str = "dataset", count: int = 60) -> None:
        super().__init__(
            count=count, dropout=0.2, noisy=kind in ("dataset", "workers", "dataloader")
        )
        self.kind = kind

    def train_data(self) -> Any:
        return {
            "dataset": lambda: Tiny.train_data(self),
            "workers": lambda: Loader(Tiny.train_data(self), num_workers=1),
            "list": lambda: [
                points(self.count)[8 * i : 8 * i + 8] for i in range(-(-self.count // 8))
            ],
            "stream": lambda: Stream(self.count),
            "sharded": lambda: Loader(Own(self.count), sharded=True),
            "stateful": lambda: Loader(Continuing(self.count)),
            "objects": lambda: [
                Rows(*points(self.count)[8 * i : 8 * i + 8]) for i in range(-(-self.count // 8))
            ],
            "combined": lambda: {
                "few": Loader(Noisy(self.count // 4), 4),
                "many": Loader(points(self.count), 4, num_workers=1),
                "stream": Loader(Continuing(self.count // 3), 3),
            },
        }[self.kind]()

    def train_step(self, batch: Any) -> Any:
        if isinstance(batch, Rows):
            return super().train_step((batch.x, batch.y))
        if isinstance(batch, dict):
            return sum(Tiny.train_step(self, part) for part in batch.values())
        return super().train_step(batch)


@dataclass(frozen=True)
class Rows:
    """A batch that is an object."""

    x: torch.Tensor
    y: torch.Tensor


class Stream(IterableDataset):
    """A stream of samples whose number is not known."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        data = points(self.count)
        return (data[i] for i in range(self.count))


class Continuing(Stream):
    """Reads on in the next pass: each pass begins one sample later."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.at = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Any:
        data = points(self.count)
        for _ in range(self.count - self.at % (self.count + 1)):
            self.at += 1
            yield data[self.at % self.count]
        self.at += 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


class Own(IterableDataset):
    """Samples of this rank alone; later ranks have more."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Any:
        import torch.distributed as dist

        rank = dist.get_rank() if dist.is_initialized() else 0
        data = points(self.count + 17 * rank, seed=rank + 1)
        return (data[i] for i in range(self.count + 17 * rank))


class Scored(Tiny):
    """Tiny that checks which samples were scored, and measures in every way that a task can."""

    def __init__(self, count: int = 20, kind: str = "dataset") -> None:
        super().__init__()
        self.count, self.kind = count, kind

    def eval_data(self) -> Any:
        x, y = points(max(self.count, 1), seed=2).tensors
        data = TensorDataset(x[: self.count], y[: self.count], torch.arange(self.count))
        if self.kind == "list":
            return [tuple(t[i : i + 3] for t in data.tensors) for i in range(0, self.count, 3)]
        return data

    def eval_step(self, batch: Any) -> dict[str, Any]:
        x, y, ids = batch
        logits = self.net(x)
        self.log("entropy", logits.softmax(-1).log().mul(-1).mean())
        return {
            "loss": F.cross_entropy(logits, y),
            "preds": logits,
            "target": y,
            "ids": ids,
            "value": logits.sum(-1),
        }

    def predict_step(self, batch: Any) -> Any:
        return {"ids": batch[2], "names": [f"sample {i}" for i in batch[2].tolist()]}

    def metrics(self) -> Any:
        import torchmetrics
        from torchmetrics.classification import (
            MulticlassAccuracy,
            MulticlassAUROC,
            MulticlassConfusionMatrix,
        )

        class_metrics = {
            "accuracy": MulticlassAccuracy(num_classes=3, average="macro"),
            "auroc": MulticlassAUROC(num_classes=3),
        }
        return {
            **class_metrics,
            "all": torchmetrics.MetricCollection(
                {
                    "f1": torchmetrics.F1Score("multiclass", num_classes=3, average="macro"),
                    "recall": torchmetrics.Recall("multiclass", num_classes=3, average="macro"),
                }
            ),
            "matrix": MulticlassConfusionMatrix(num_classes=3),
            "mean": torchmetrics.MeanMetric(),
            "ours": SmoothedStd(),
        }

    def compute_metrics(self, outputs: Any) -> dict[str, float]:
        ids = outputs.ids.tolist()
        assert ids == list(range(self.count)), ids
        return {
            "seen": len(ids),
            "right": float((outputs.preds.argmax(-1) == outputs.target).mean()),
        }


class SmoothedStd:
    """A metric without torchmetrics, which depends on the order of its updates."""

    def __init__(self) -> None:
        self.value = 0.0

    def update(self, preds: torch.Tensor) -> None:
        self.value = 0.9 * self.value + float(preds.double().std())

    def compute(self) -> float:
        return self.value

    def reset(self) -> None:
        self.value = 0.0


class TwoStep(StepLoop):
    """One update for each of two players."""

    def run(self, run: Any, batches: Any) -> Any:
        losses = {}
        for player in ("left", "right"):
            losses[player] = self.backward(
                run, batches, method=f"{player}_step", optimizers=[player]
            )["loss"]
            self.update(run, optimizers=[player])
        return {"loss": losses["left"] + losses["right"]}


class Players(Tiny):
    """Two networks with an optimizer each; the loss of the second runs through the first."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.left, self.right = nn.Linear(8, 3), nn.Linear(3, 3)
        del self.net

    def loops(self) -> Any:
        return {"step": TwoStep()}

    def left_step(self, batch: Any) -> Any:
        return F.cross_entropy(self.right(self.left(batch[0])), batch[1])

    def right_step(self, batch: Any) -> Any:
        return F.cross_entropy(self.right(self.left(batch[0]).detach()), batch[1])

    def eval_data(self) -> Any:
        return None

    def optimizers(self) -> Any:
        return {name: AdamW(lr=1e-2, params=f"^{name}") for name in ("left", "right")}


class PartFrozen(TokenClassifier):
    """A TokenClassifier with a frozen embedding, a parameter that may be a scalar, and a counter."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.embed.requires_grad_(False)
        self.scale = nn.Parameter(torch.full(shape, 1.5))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def train_step(self, batch: Any) -> Any:
        self.steps += 1
        told = super().train_step(batch)
        return {**told, "loss": told["loss"] * self.scale.sum()}


TASKS: dict[str, Any] = {
    "tiny": Tiny,
    "words": TokenClassifier,
    "kinds": Kinds,
    "scored": Scored,
    "players": Players,
    "part frozen": PartFrozen,
    "measured": Measured,
}
