"""Images by class: a vision model of transformers is fine-tuned, frozen at first.

    pip install 'loopkit-torch[hf,examples]'
    python -m tasks.images
    python -m tasks.images --data images/ --model path/to/vit --augment cut
    loopkit fit tasks/images.py --data images/ --epochs 10 --hooks+='Unfreeze({"2 epochs": "model.vit"})'

A folder holds a folder of images for each class. Without ``--data`` it learns scikit-learn's digits.
Without ``--model`` it trains a small vision transformer from scratch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from loopkit import Checkpoint, Fit, Loader
from loopkit.checkpoint.tools import export_model
from loopkit.errors import LoopkitError, OptionError
from loopkit.hooks import Unfreeze
from loopkit.interop import HFTask
from loopkit.optim import AdamW, cosine
from tasks.image_data import class_names, labelled_images, recut, save_grid, warped

AUGMENT = {"none": None, "warp": warped, "cut": recut}


class Images(HFTask):
    """Classifies images. Every fifth one of a class is for evaluation.

    Args:
        data: a folder with a folder of images for each class; None for scikit-learn's digits.
        model: a folder with an image classifier of transformers to fine-tune, whose head is replaced
            if it has other classes; None makes a small vision transformer.
        augment: what is done to each image in training: "none", "warp" (turned, scaled and moved a
            little), or "cut" (cut and mirrored at random, for photos).
        size: height and width that images get for the small model, a multiple of 4; 8 for digits, 32
            for a folder if None.
        width: size of the vectors of the small model.
        layers: number of layers of the small model.
        most: images of each class to train on; None for all.
        lr: peak learning rate; about 5e-5 for a pretrained model.
        workers: processes that load data.
    """

    def __init__(
        self,
        data: str | None = None,
        model: str | None = None,
        augment: str = "warp",
        size: int | None = None,
        width: int = 64,
        layers: int = 3,
        most: int | None = None,
        lr: float = 1e-3,
        workers: int = 0,
    ) -> None:
        if augment not in AUGMENT:
            raise OptionError(f"augment={augment!r}: give one of {', '.join(AUGMENT)}")
        names = class_names(data)
        labels: Any = {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }
        if model is None:
            size = size or (8 if data is None else 32)
            config = ViTConfig(
                image_size=size,
                patch_size=2 if size < 32 else 4,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=2 * width,
                **labels,
            )
            network: Any = ViTForImageClassification(config)
            processor: Any = ViTImageProcessor(size={"height": size, "width": size})
        else:
            network = AutoModelForImageClassification.from_pretrained(
                model, ignore_mismatched_sizes=True, **labels
            )
            processor = AutoImageProcessor.from_pretrained(model)
        train = labelled_images(data, held_out=False, most=most, transform=AUGMENT[augment])
        held_out = labelled_images(data, held_out=True)
        super().__init__(
            network,
            Loader(Prepared(train, processor), num_workers=workers),
            Prepared(held_out, processor),
            tokenizer=processor,
        )
        self.lr = lr

    @property
    def body(self) -> str:
        """The name of the model without its head, for ``Unfreeze``."""
        return f"model.{self.model.base_model_prefix}"

    def optimizers(self) -> Any:
        return AdamW(lr=self.lr, weight_decay=0.05, schedule=cosine(warmup="10%"))

    def compute_metrics(self, outputs: Any) -> Mapping[str, float]:
        return {"accuracy": (outputs.preds.argmax(-1) == outputs.target).mean()}


class Prepared(Dataset[dict[str, Any]]):
    """Images as the model takes them: in its size, and normalised by its rule."""

    def __init__(self, images: Dataset[tuple[Tensor, int]], processor: Any) -> None:
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.images[index]
        image = (image.clamp(0, 1) * 255).round().byte()  # as it was in the file
        pixels = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": label}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, keep the best model, export it, and name some images that it has not seen."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.images", description="Learn to tell images apart."
    )
    parser.add_argument("--data", help="a folder of images by class (default: digits)")
    parser.add_argument("--model", help="a folder with a classifier (default: a small new one)")
    parser.add_argument("--augment", default="warp", choices=AUGMENT, help="default: warp")
    parser.add_argument("--size", type=int, help="height of a new model's images (8, or 32)")
    parser.add_argument("--most", type=int, help="images of each class to train on (default: all)")
    parser.add_argument("--frozen", type=float, default=1, help="epochs of the head alone (1)")
    parser.add_argument("--lr", type=float, help="peak rate (default: 5e-5; of a new model 1e-3)")
    parser.add_argument("--epochs", type=float, default=20, help="passes over the data (20)")
    parser.add_argument("--picture", type=Path, help="a PNG file: a row of images that it names so")
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        rate = args.lr or (5e-5 if args.model else 1e-3)
        task = Images(args.data, args.model, args.augment, args.size, most=args.most, lr=rate)
        freezes = args.model and args.frozen
        fit = Fit(
            epochs=args.epochs,
            clip_norm=1.0,
            hooks=[Unfreeze({f"{args.frozen:g} epochs": task.body})] if freezes else [],
            checkpoint=Checkpoint(best="eval/accuracy:max", load_best=True),
        )
        result = fit.run(task)
        exported = export_model(result.best["checkpoint"], Path(str(result.run_dir), "best"))
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"accuracy {result.best['value']:.3f} after {result.best['step']} steps")
    print(f"opens with from_pretrained: {exported}")
    if args.picture:
        draw(fit.predict(task).argmax(-1), args.data, args.picture)
    return 0


def draw(named: Tensor, data: str | None, path: Path, columns: int = 12) -> None:
    """Draw a row for each class, with held-out images that the model ``named`` so, wrong ones first."""
    images, labels = labelled_images(data, held_out=True, size=32).stacked()
    rows = []
    for label in range(len(class_names(data))):
        wrong, right = ((named == label) & (labels.eq(label) == is_so) for is_so in (False, True))
        row = torch.cat([images[wrong], images[right]])[:columns]
        rows.append(torch.cat([row, torch.ones(columns - len(row), *images.shape[1:])]))
    save_grid(rows, path)


if __name__ == "__main__":
    sys.exit(main())
