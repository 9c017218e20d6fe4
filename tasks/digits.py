"""Handwritten digits: scikit-learn's 1797 images of 8 x 8 pixels, learned in a few seconds.

pip install 'loopkit-torch[examples]'
python -m tasks.digits
loopkit fit tasks/digits.py --hidden 256 --epochs 30
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from loopkit import Fit, Task
from loopkit.optim import AdamW, OptimizerSpec, cosine


class Digits(Task):
    """Classifies images of digits.

    Args:
        hidden: units of the hidden layer.
        lr: peak learning rate.
    """

    def __init__(self, hidden: int = 128, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))

    def train_step(self, batch: Sequence[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def eval_step(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        logits = self.net(images)
        return {"loss": F.cross_entropy(logits, labels), "preds": logits, "target": labels}

    def predict_step(self, batch: Sequence[Tensor]) -> Tensor:
        return self.net(batch[0]).argmax(-1)

    def metrics(self) -> Mapping[str, MulticlassAccuracy]:
        return {"accuracy": MulticlassAccuracy(num_classes=10, average="micro")}

    def optimizers(self) -> OptimizerSpec:
        return AdamW(lr=self.lr, weight_decay=0.01, schedule=cosine(warmup="10%"))

    def train_data(self) -> TensorDataset:
        return TensorDataset(*_digits(held_out=False))

    def eval_data(self) -> TensorDataset:
        return TensorDataset(*_digits(held_out=True))


def _digits(*, held_out: bool) -> tuple[Tensor, Tensor]:
    """Return images (n, 64) from 0 to 1 and labels (n,). Every fifth image is for evaluation."""
    data = load_digits()
    images, labels = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    chosen = (torch.arange(len(labels)) % 5 == 4) == held_out
    return images[chosen], labels[chosen]


def main() -> None:
    """Train, then print some predictions."""
    task = Digits()
    fit = Fit(epochs=20, eval_every="5 epochs")
    result = fit.run(task)
    predicted, (_, labels) = fit.predict(task), _digits(held_out=True)
    print(
        f"accuracy on {len(labels)} images it has not seen: {result.metrics['eval/accuracy']:.3f}"
    )
    print("predicted:", " ".join(map(str, predicted[:20].tolist())))
    print("shown:    ", " ".join(map(str, labels[:20].tolist())))
    print("files:    ", result.run_dir)


if __name__ == "__main__":
    main()
