"""Tasks of small transformers models."""

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification

from loopkit.interop import HFTask
from loopkit.optim import AdamW

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


def smoothed(outputs, batch):
    """A loss of the user's own."""
    return F.cross_entropy(outputs["logits"], batch["labels"], label_smoothing=0.1)


def padded(samples):
    """A collate function of the user's own."""
    width = max(len(sample["input_ids"]) for sample in samples)
    ids = [sample["input_ids"] + [0] * (width - len(sample["input_ids"])) for sample in samples]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor([s["label"] for s in samples], dtype=torch.int32),
        "name": [sample["name"] for sample in samples],
    }


class Scored(HFTask):
    """Has a column that the model does not take."""

    def __init__(self, own: bool = True, named: bool = True):
        rows = [
            {"input_ids": [1, 2 + n % 7] * (1 + n % 3), "label": n % 2, "name": str(n)}
            for n in range(40)
        ]
        if not named:
            rows = [{name: row[name] for name in ("input_ids", "label")} for row in rows]
        model = BertForSequenceClassification(BertConfig(vocab_size=10, **SIZES))
        more = {"loss_fn": smoothed, "collate_fn": padded} if own else {}
        super().__init__(model, rows, rows, **more)

    def optimizers(self):
        return AdamW(lr=1e-2)


class Reaches(Scored):
    """Uses what the script's class does not have."""

    def __init__(self):
        super().__init__(own=False, named=False)

    def train_step(self, batch):
        return F.cross_entropy(self._call(batch)["logits"], batch["labels"].long())
