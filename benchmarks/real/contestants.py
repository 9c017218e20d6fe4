"""Each contestant trains a job as its documentation shows: no logs, no bar, no checkpoints."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.real.jobs import LR, RealJob
from benchmarks.turns import TUNED
from loopkit import Fit, Task
from loopkit.data import Loader
from loopkit.optim import AdamW


def by_hand(job: RealJob) -> None:
    """Run a loop around torch's DataLoader, with a fused AdamW."""
    model, optimizer, loader = job.timed.train(), job.optimizer(), job.loader()
    for _ in range(job.epochs):
        for batch in loader:
            loss = model(**batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()


class RealTask(Task):
    """The job as a Task."""

    def __init__(self, job: RealJob) -> None:
        super().__init__()
        self.job, self.timed = job, job.timed

    def train_step(self, batch: dict[str, Any]) -> Any:
        return self.timed(**batch)

    def optimizers(self) -> Any:
        return AdamW(lr=LR, weight_decay=0.01, no_decay=())

    def train_data(self) -> Any:
        return Loader(
            self.job.data,
            collate_fn=self.job.collate,
            num_workers=self.job.num_workers,
            persistent_workers=self.job.num_workers > 0,
        )


def loopkit(job: RealJob) -> None:
    """Run Fit."""
    Fit(
        epochs=job.epochs,
        batch_size=job.batch_size,
        loggers=None,
        progress=False,
        checkpoint=False,
        log_every="never",
        seed=job.seed,
    ).run(RealTask(job))


def transformers(job: RealJob) -> None:
    """Run Hugging Face's Trainer."""
    from transformers import Trainer, TrainingArguments

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.timed = job.timed

        # Trainer passes this too.
        def forward(self, num_items_in_batch: Any = None, **batch: Any) -> dict[str, Any]:
            return {"loss": self.timed(**batch)}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=job.epochs,
            per_device_train_batch_size=job.batch_size,
            dataloader_num_workers=job.num_workers,
            dataloader_persistent_workers=job.num_workers > 0,
            remove_unused_columns=False,
            use_cpu=True,
            seed=job.seed,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(
            Outer(),
            arguments,
            data_collator=job.collate,
            train_dataset=job.data,
            optimizers=(job.optimizer(), None),
        ).train()


def lightning(job: RealJob) -> None:
    """Run Lightning's Trainer."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.timed = job.timed

        def training_step(self, batch: Any, index: int) -> Any:
            return self.timed(**batch)

        def configure_optimizers(self) -> Any:
            return job.optimizer()

    pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=job.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Module(), job.loader())


def accelerate(job: RealJob) -> None:
    """Run a loop around Accelerate's wrappers."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(job.timed, job.optimizer(), job.loader())
    model.train()
    for _ in range(job.epochs):
        for batch in loader:
            loss = model(**batch)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


CONTESTANTS = {
    "by hand": by_hand,
    TUNED: by_hand,
    "loopkit": loopkit,
    "lightning": lightning,
    "transformers": transformers,
    "accelerate": accelerate,
}
