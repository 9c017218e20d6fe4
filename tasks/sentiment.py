"""Praise or blame: a transformers encoder learns to classify sentences.

    pip install 'loopkit-torch[hf]'
    python -m tasks.sentiment
    python -m tasks.sentiment --data reviews/ --model path/to/bert
    loopkit fit tasks/sentiment.py --data reviews.csv --epochs 3

Without ``--data`` it learns a small built-in sample in seconds. A folder holds ``*.pos`` and
``*.neg`` with one sentence per line. A CSV file has the columns text and label (0 or 1).
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
)

from loopkit import Checkpoint, Fit, Loader
from loopkit.checkpoint.tools import export_model
from loopkit.errors import DataError, LoopkitError
from loopkit.hooks import EarlyStop
from loopkit.interop import HFTask
from loopkit.optim import AdamW, linear

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Sentiment(HFTask):
    """Classifies praise (1) and blame (0). Every tenth sentence is for evaluation.

    Args:
        data: a folder with ``*.pos`` and ``*.neg``, a CSV file with the columns text and label, or
            None for a sample.
        model: a folder with a transformers encoder to fine-tune; None makes a small one and its
            vocabulary.
        width: size of the vectors of the small encoder.
        layers: number of layers of the small encoder.
        lr: peak learning rate; about 2e-5 for a pretrained model.
        workers: processes that load data.
    """

    def __init__(
        self,
        data: str | None = None,
        model: str | None = None,
        width: int = 64,
        layers: int = 2,
        lr: float = 1e-3,
        workers: int = 0,
    ) -> None:
        texts = _sample() if data is None else _read(Path(data))
        if model is None:
            # This code counts words itself: the WordPiece trainer of tokenizers gives them other
            # numbers each time.
            counts = Counter(
                re.findall(r"\w+|[^\w\s]", " ".join(text for text, _ in texts).lower())
            ).most_common(8000)
            known = [*SPECIAL, *(word for word, count in counts if count > 1)]
            words: Any = BertTokenizer(vocab={word: number for number, word in enumerate(known)})
            size = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4}
            size |= {
                "vocab_size": len(words),
                "intermediate_size": 4 * width,
                "max_position_embeddings": 64,
            }
            encoder: Any = BertForSequenceClassification(BertConfig(pad_token_id=0, **size))
        else:
            words = AutoTokenizer.from_pretrained(model)
            encoder = AutoModelForSequenceClassification.from_pretrained(model)
        ids = words([text for text, _ in texts], truncation=True, max_length=64)["input_ids"]
        rows = [{"input_ids": row, "label": label} for row, (_, label) in zip(ids, texts)]
        train, held_out = (
            [row for i, row in enumerate(rows) if (i % 10 == 9) == held] for held in (False, True)
        )
        super().__init__(
            encoder,
            Loader(train, num_workers=workers, group_by_length=True),
            held_out,
            tokenizer=words,
        )
        self.lr = lr

    def optimizers(self) -> Any:
        return AdamW(lr=self.lr, weight_decay=0.01, schedule=linear(warmup="10%"))

    def compute_metrics(self, outputs: Any) -> Mapping[str, float]:
        preds, target = outputs.preds.argmax(-1), outputs.target
        hits = (preds * target).sum()
        return {
            "accuracy": (preds == target).mean(),
            "f1": 2 * hits / max(1, preds.sum() + target.sum()),
        }

    @torch.no_grad()
    def classify(self, texts: Sequence[str]) -> list[float]:
        """Return for each text the probability that it is praise, from 0 to 1."""
        batch = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        inputs = {
            name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }
        found: list[float] = self.eval().predict_step(inputs).softmax(-1)[:, 1].tolist()
        return found


def _sample() -> list[tuple[str, int]]:
    """Return made sentences, with praise and blame in random order."""
    words = [
        ("dull", "lovely"),
        ("a weak", "a great"),
        ("a silly", "a moving"),
        ("a tired", "a fresh"),
    ]
    subjects, degrees = (
        ("plot", "cast", "score", "film", "ending"),
        ("", "quite ", "truly ", "at times "),
    )
    parts = product(words, subjects, degrees, (0, 1))
    made = [(f"{degree}{pair[label]} {subject}", label) for pair, subject, degree, label in parts]
    order = torch.randperm(len(made), generator=torch.Generator().manual_seed(0))
    return [made[int(number)] for number in order]


def _read(path: Path) -> list[tuple[str, int]]:
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in (".neg", ".pos")]
        lines = [
            (line, int(file.suffix == ".pos"))
            for file in files
            for line in file.read_text("utf-8").splitlines()
        ]
        found = [(line, label) for line, label in lines if line.strip()]
    elif path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            found = [(row["text"], int(row["label"])) for row in csv.DictReader(file)]
    else:
        found = []
    if {label for _, label in found} != {0, 1}:
        raise DataError(
            f"{path} holds no praise and blame: give a folder with *.pos and *.neg, one sentence "
            "per line, or a CSV file with the columns text and label, 1 for praise and 0 for blame"
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, keep the best model by F1, export it, and classify two sentences."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.sentiment", description="Learn to tell praise from blame."
    )
    parser.add_argument(
        "--data", help="a folder with *.pos and *.neg, or a CSV file (default: a small sample)"
    )
    parser.add_argument(
        "--model", help="a folder with a transformers encoder (default: a small new one)"
    )
    parser.add_argument(
        "--epochs", type=float, help="passes over the data (default: 3; of the sample 30)"
    )
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        task = Sentiment(args.data, args.model, lr=2e-5 if args.model else 1e-3)
        result = Fit(
            epochs=args.epochs or (3 if args.data else 30),
            clip_norm=1.0,
            eval_every="200 steps",
            precision="fp16" if torch.cuda.is_available() else "fp32",
            hooks=[EarlyStop("eval/f1:max", patience=3)],
            checkpoint=Checkpoint(every="200 steps", keep=2, best="eval/f1:max", load_best=True),
        ).run(task)
    except LoopkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"F1 {result.best['value']:.3f} after {result.best['step']} steps")
    exported = export_model(result.best["checkpoint"], Path(str(result.run_dir), "best"))
    print(f"opens with from_pretrained: {exported}")
    for text in ("a moving film with a great cast", "a dull plot and a tired ending"):
        print(f"{task.classify([text])[0]:.2f}  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
