"""The jobs: a model, a data set that makes its samples, and how they become batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset, default_collate

LR = 1e-3


class Timed(nn.Module):
    """A model that returns its loss, and notes when each call of it began and how many samples it had."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self._loss = model, loss
        self.calls: list[tuple[float, int]] = []
        self.clock: Callable[[], float] = perf_counter

    def forward(self, **batch: Tensor) -> Tensor:
        self.calls.append((self.clock(), len(batch["labels"])))
        return self._loss(self.model, **batch)


@dataclass
class RealJob:
    """One job.

    Attributes:
        model: makes the model, with the same weights each time.
        data: what is read, by index.
        collate: makes a batch, a dict that has "labels", of a list of samples.
        batch_size: samples per batch.
        epochs: passes over the data.
        num_workers: processes that read ahead.
        seed: seeds the order of the samples, in each contestant's own way.
    """

    model: Callable[[], Timed]
    data: Any
    collate: Callable[[list[Any]], dict[str, Tensor]]
    batch_size: int
    epochs: int
    num_workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.timed = self.model()

    @property
    def samples(self) -> int:
        """Samples that a run reads."""
        return self.epochs * len(self.data)

    def optimizer(self) -> torch.optim.Optimizer:
        """Return a fused AdamW over all parameters."""
        return torch.optim.AdamW(self.timed.parameters(), lr=LR, fused=True)

    def loader(self) -> torch.utils.data.DataLoader[Any]:
        """Return torch's own DataLoader over the data."""
        return torch.utils.data.DataLoader(
            self.data,
            self.batch_size,
            shuffle=True,
            collate_fn=self.collate,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )


def stacked(items: list[Any]) -> dict[str, Tensor]:
    """Make a batch of pairs of an input and a label."""
    x, labels = default_collate(items)
    return {"x": x, "labels": labels}


def _classified(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x), labels)


def cnn() -> RealJob:
    """A convolutional network on scikit-learn's images of digits, from a TensorDataset."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16.0
    data = TensorDataset(images, torch.tensor(digits.target))

    def model() -> Timed:
        net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        return Timed(net, _classified)

    return RealJob(model, data, stacked, batch_size=32, epochs=20)


def charlm() -> RealJob:
    """A small GPT on the characters of Python's standard library, as in tasks/charlm.py."""
    from tasks.charlm import CharLM

    windows = CharLM()._windows(held_out=False)[:1500]

    def next_letter(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x.long()).flatten(0, 1), labels.long().flatten())

    data = TensorDataset(windows[:, :-1], windows[:, 1:])
    return RealJob(lambda: Timed(CharLM(), next_letter), data, stacked, batch_size=16, epochs=2)


def bert() -> RealJob:
    """A small BERT that classifies texts of 8 to 64 tokens, padded to the longest of a batch."""
    from datasets import Dataset as Table
    from tokenizers import Tokenizer, models
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        DataCollatorWithPadding,
        PreTrainedTokenizerFast,
    )

    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 65, (1000,), generator=draw).tolist()
    rows = [torch.randint(5, 4000, (n,), generator=draw).tolist() for n in lengths]
    table = Table.from_dict(
        {
            "input_ids": rows,
            "attention_mask": [[1] * n for n in lengths],
            "label": [row[0] % 2 for row in rows],
        }
    )
    words = models.WordLevel({"[PAD]": 0, "[UNK]": 1}, "[UNK]")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="[PAD]")
    config = BertConfig(
        vocab_size=4000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=512, num_labels=2,
    )  # fmt: skip

    def loss(model: nn.Module, **batch: Tensor) -> Tensor:
        return model(**batch).loss

    return RealJob(
        lambda: Timed(BertForSequenceClassification(config), loss),
        table,
        DataCollatorWithPadding(tokenizer),
        batch_size=16,
        epochs=2,
    )


class Photos(Dataset[tuple[Tensor, int]]):
    """Images as bytes, each cut and mirrored at random when it is read."""

    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(1)
        self.images = torch.randint(0, 256, (count, 3, 40, 40), dtype=torch.uint8, generator=draw)
        self.labels = torch.randint(0, 10, (count,), generator=draw).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        top, left, mirror = torch.randint(0, 8, (3,)).tolist()
        image = self.images[index, :, top : top + 32, left : left + 32].float() / 255.0
        image = (image.flip(2) if mirror < 4 else image) - 0.5
        return image * (0.8 + 0.4 * torch.rand(())), self.labels[index]


def vit() -> RealJob:
    """A small ViT on images that two processes cut and mirror at random."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=96, num_hidden_layers=3, num_attention_heads=3,
        intermediate_size=192, num_labels=10,
    )  # fmt: skip

    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model(x).logits, labels)

    return RealJob(
        lambda: Timed(ViTForImageClassification(config), loss),
        Photos(1000),
        stacked,
        batch_size=32,
        epochs=4,
        num_workers=2,
    )


JOBS = {"CNN": cnn, "charlm": charlm, "BERT": bert, "ViT": vit}
