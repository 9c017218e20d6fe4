"""Distillation: a small student learns from the answers of a frozen teacher.

    pip install 'loopkit-torch[examples]'
    python -m tasks.distill
    python -m tasks.distill --data images/ --size 32 --teacher path/to/vit
    loopkit fit tasks/distill.py --labelled 20 --alpha 0.7

Few images have labels, and the teacher knows all images. The loss is that of Hinton et al. (2015). The
teacher is neither trained nor saved: checkpoints hold a hash of it, and another teacher is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from loopkit import Fit, Task
from loopkit.errors import CheckpointError, LoopkitError, OptionError
from loopkit.optim import AdamW, OptimizerSpec, cosine
from tasks.image_data import class_names, labelled_images

NO_LABEL = -100
TEACHER = "teacher.json"


class KernelTeacher(nn.Module):
    """Classifies by similarity to known images: kernel ridge regression, solved in one step.

    Args:
        images: known images [n, channels, height, width].
        labels: their classes [n].
        classes: number of classes.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("images", images.flatten(1))
        self.register_buffer("labels", labels)
        self.scale = torch.cdist(self.images, self.images).square().median().item() / 5
        wanted = F.one_hot(labels, classes) * 2.0 - 1
        kernel = self.similarity(self.images) + 0.01 * torch.eye(len(images))
        self.register_buffer("factors", torch.linalg.solve(kernel, wanted), persistent=False)

    def similarity(self, images: Tensor) -> Tensor:
        return (-torch.cdist(images, self.images).square() / self.scale).exp()

    def forward(self, images: Tensor) -> Tensor:
        return 5 * self.similarity(images.flatten(1)) @ self.factors


class FolderTeacher(nn.Module):
    """An image classifier of transformers, such as ``tasks.images`` exports.

    Args:
        folder: its folder.
        names: the classes that it must know, in this order.

    Raises:
        OptionError: it knows other classes.
    """

    def __init__(self, folder: str, names: Sequence[str]) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        super().__init__()
        self.model: Any = AutoModelForImageClassification.from_pretrained(folder)
        known = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]
        if known != list(names):
            raise OptionError(
                f"the teacher in {folder} knows the classes {', '.join(known)}, and the data has "
                f"{', '.join(names)}: fine-tune it on this data, as python -m tasks.images does"
            )
        processor = AutoImageProcessor.from_pretrained(folder)
        for name in ("image_mean", "image_std"):
            value = torch.tensor(getattr(processor, name))[:, None, None]
            self.register_buffer(name, value, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=(images - self.image_mean) / self.image_std).logits


class Distill(Task):
    """A small network that classifies images, taught by labels and by a teacher.

    Args:
        data: a folder of images by class; None for scikit-learn's digits.
        teacher: a folder with an image classifier of transformers for images of this size; None for
            a ``KernelTeacher`` that knows the labels of all images, for some thousand of them.
        size: height and width that the images of a folder get.
        labelled: images of each class whose label the student sees.
        alpha: weight of the teacher's answers in the loss; 0 means labels alone.
        temperature: divides the logits of both before they are compared.
        width: channels of the student.
        lr: peak learning rate.
    """

    def __init__(
        self,
        data: str | None = None,
        teacher: str | None = None,
        size: int = 32,
        labelled: int = 10,
        alpha: float = 0.9,
        temperature: float = 2.0,
        width: int = 8,
        lr: float = 1e-2,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise OptionError(f"temperature={temperature}: give a number above 0")
        self.data, self.size, self.labelled = data, size, labelled
        self.alpha, self.temperature, self.lr = alpha, temperature, lr
        names = class_names(data)
        self.classes = len(names)
        self.channels = 1 if data is None and teacher is None else 3
        self.student = nn.Sequential(
            nn.Conv2d(self.channels, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(16 * width, self.classes),
        )
        known: nn.Module = (
            KernelTeacher(*self._images(held_out=False), self.classes)
            if teacher is None
            else FolderTeacher(teacher, names)
        )
        # In a list it is no part of this module: it is not saved, and no optimizer finds it.
        self.teachers = [known.eval().requires_grad_(False)]

    def teach(self, images: Tensor) -> Tensor:
        """Return the teacher's logits for images [n, channels, height, width]."""
        with torch.no_grad():
            return self.teachers[0].to(images.device)(images)

    def train_step(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        logits = self.student(images)
        # Both parts are means over all images, those without a label included.
        hard = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="sum") / len(labels)
        soft = F.kl_div(
            (logits / self.temperature).log_softmax(-1),
            (self.teach(images) / self.temperature).softmax(-1),
            reduction="batchmean",
        )
        loss = (1 - self.alpha) * hard + self.alpha * self.temperature**2 * soft
        return {"loss": loss, "hard": hard.detach(), "soft": soft.detach()}

    def eval_step(self, batch: Sequence[Tensor]) -> dict[str, Tensor]:
        images, labels = batch
        logits = self.student(images)
        return {
            "loss": F.cross_entropy(logits, labels),
            "preds": logits,
            "taught": self.teach(images),
            "target": labels,
        }

    def metrics(self) -> Mapping[str, Any]:
        accuracy = MulticlassAccuracy(num_classes=self.classes, average="micro")
        return {"accuracy": accuracy, "teacher/accuracy": (accuracy.clone(), "taught", "target")}

    def optimizers(self) -> OptimizerSpec:
        return AdamW(lr=self.lr, weight_decay=0.01, schedule=cosine(warmup="10%"))

    def train_data(self) -> TensorDataset:
        images, labels = self._images(held_out=False)
        for label in range(self.classes):
            (own,) = (labels == label).nonzero(as_tuple=True)
            labels[own[self.labelled :]] = NO_LABEL
        return TensorDataset(images, labels)

    def eval_data(self) -> TensorDataset:
        return TensorDataset(*self._images(held_out=True))

    def checkpoint_files(self) -> Mapping[str, bytes]:
        """Return the hash of the teacher, whose weights are not saved."""
        sha = hashlib.sha256()
        for name, value in self.teachers[0].state_dict().items():
            sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return {TEACHER: json.dumps({"sha256": sha.hexdigest()}).encode()}

    def check_files(self, files: Mapping[str, bytes], path: Path) -> None:
        """Refuse a checkpoint of a student that learned from another teacher."""
        if files.get(TEACHER) != self.checkpoint_files()[TEACHER]:
            raise CheckpointError(
                f"the student of {path} learned from another teacher: give the same teacher= and data="
            )

    def _images(self, *, held_out: bool) -> tuple[Tensor, Tensor]:
        return labelled_images(
            self.data, held_out=held_out, size=self.size, channels=self.channels
        ).stacked()


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the same student twice, by labels alone and by labels and teacher."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.distill", description="Teach a small network by a large one."
    )
    parser.add_argument("--data", help="a folder of images by class (default: digits)")
    parser.add_argument("--size", type=int, default=32, help="height of a folder's images (32)")
    parser.add_argument("--teacher", help="a folder with a classifier of transformers")
    parser.add_argument("--labelled", type=int, default=10, help="labels of each class (10)")
    parser.add_argument("--epochs", type=float, default=20, help="passes over the data (20)")
    parser.add_argument(
        "--picture", type=Path, help="a PNG file for both curves (needs matplotlib)"
    )
    args = parser.parse_args(arguments)
    curves = {}
    try:
        for name, alpha in (("labels alone", 0.0), ("labels and teacher", 0.9)):
            torch.manual_seed(0)
            task = Distill(args.data, args.teacher, args.size, args.labelled, alpha)
            result = Fit(epochs=args.epochs).run(task)
            curves[name] = [
                row["eval/accuracy"] for row in result.history if "eval/accuracy" in row
            ]
            print(
                f"{name}: accuracy {result.metrics['eval/accuracy']:.3f}, files in {result.run_dir}"
            )
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    teacher = result.metrics["eval/teacher/accuracy"]
    print(f"the teacher: accuracy {teacher:.3f}")
    if args.picture:
        draw(curves, teacher, args.picture)
    return 0


def draw(curves: Mapping[str, Sequence[float]], teacher: float, path: Path) -> None:
    """Draw the accuracy after each epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.axhline(teacher, color="grey", linestyle=":", label="the teacher")
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, label=name)
    axes.set(xlabel="epoch", ylabel="accuracy on held-out images")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    sys.exit(main())
