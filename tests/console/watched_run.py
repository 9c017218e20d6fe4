"""A short run to watch: python -m tests.console.watched_run RUN_DIR [interrupt|leave]."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from loopkit import Checkpoint, Fit
from tests.support import Tiny


class Watched(Tiny):
    """Tiny with metrics of its own. In step 7 of 16 it presses Ctrl-C: once, or to leave twice."""

    def __init__(self, ending: str = "") -> None:
        super().__init__(count=64)
        self.ending, self.calls = ending, 0

    def train_step(self, batch: Any) -> Any:
        self.calls += 1
        if self.calls == 7 and self.ending:
            os.kill(os.getpid(), signal.SIGINT)
            if self.ending == "leave":
                os.kill(os.getpid(), signal.SIGINT)
            print("the step continues")
        logits = self.net(batch[0])
        accuracy = (logits.argmax(-1) == batch[1]).float().mean()
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        if not sys.stdout.isatty():
            print("step loss", float(loss))
        return {"loss": loss, "accuracy": accuracy}

    def metrics(self) -> Any:
        return {
            "accuracy": MulticlassAccuracy(num_classes=3),
            "macro_f1": MulticlassF1Score(num_classes=3, average="macro"),
            "weighted_f1": MulticlassF1Score(num_classes=3, average="weighted"),
        }


if __name__ == "__main__":
    run_dir, ending = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else ""
    fit = Fit(
        epochs=2, batch_size=8, run_dir=run_dir, eval_every="4 steps", seed=1,
        checkpoint=Checkpoint(background=False), loggers=("jsonl",), resume="auto",
    )  # fmt: skip
    if ending == "leave":
        fit.on("step_start", lambda run, batches: run.progress.step == 2 and run.request("save"))
    print(fit.run(Watched(ending if ending != "again" else "")).summary())
