"""A task that measures by every metric of loopkit."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import TensorDataset
from torchmetrics import SumMetric

from loopkit import Task
from loopkit.errors import MetricError
from loopkit.optim import SGD
from tests.support import quiet

TYPES = ["O", "B-x", "I-x", "B-y", "I-y"]
WORDS = ["the", "cat", "été", "sat\non", "mat"]


class Measured(Task):
    """Random scores of tokens: they are tags, start and end logits, classes and words of texts.

    Sample ``i`` is window ``i`` of question ``i // 3``, so that ranks share the windows of a question.
    """

    def __init__(self, count: int = 20) -> None:
        super().__init__()
        self.net = torch.nn.Linear(5, 5)
        self.count = count

    def train_step(self, batch: Any) -> Any:
        return self.net(batch[0]).mean()

    def optimizers(self) -> Any:
        return SGD(lr=0.1)

    def train_data(self) -> Any:
        return self.eval_data()

    def eval_data(self) -> Any:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(self.count, 7, 5, generator=generator)
        y = torch.randint(0, 5, (self.count, 7), generator=generator)
        return TensorDataset(x, y.masked_fill(x[..., 0] > 1, -100), torch.arange(self.count))

    def eval_step(self, batch: Any) -> dict[str, Any]:
        logits, target, feature = batch
        texts = [
            [" ".join(WORDS[i] for i in row) for row in ids.tolist()]
            for ids in (logits.argmax(-1), target.clamp(min=0))
        ]
        return {
            "preds": logits,
            "target": target,
            "start_logits": logits[..., 0],
            "end_logits": logits[..., 1],
            "feature": feature,
            "texts": texts[0],
            "references": texts[1],
        }

    def metrics(self) -> Any:
        from loopkit.metrics import Confidence, PerClassAccuracy, ROUGELsum, SpanF1, SQuAD

        offsets = [None, *((i, i + 3) for i in range(0, 24, 4))]
        questions = [
            {"id": i, "context": "a b the c d " * 2, "answers": ["c d", "b"] if i % 2 else []}
            for i in range(self.count // 3 + 1)
        ]
        windows = [{"example_id": i // 3, "offset_mapping": offsets} for i in range(self.count)]
        return {
            "spans": SpanF1(TYPES),
            "strict": SpanF1(TYPES, "IOB2"),
            "squad": SQuAD(questions, windows, no_answer=True),
            "confidence": Confidence(),
            "classes": PerClassAccuracy(TYPES),
            "rouge": (ROUGELsum(), "texts", "references"),
        }


class OnRankZero(Measured):
    """Has rank 0 compute a metric of torchmetrics, which would talk to the other ranks."""

    def __init__(self, count: int = 20, sync: bool = True) -> None:
        super().__init__(count)
        self.sync = sync

    def metrics(self) -> Any:
        return {}

    def compute_metrics(self, outputs: Any) -> dict[str, Any]:
        metric = SumMetric(sync_on_compute=self.sync)
        metric.update(torch.from_numpy(outputs.feature))
        return {"sum": metric.compute()}


def on_rank_zero(**arguments: Any) -> Any:
    """Return the metric, or the error's text."""
    try:
        return quiet(strategy="ddp", batch_size=3).evaluate(OnRankZero(**arguments))["eval/sum"]
    except MetricError as error:
        return str(error)
