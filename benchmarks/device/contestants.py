"""Each contestant trains a job in bfloat16 autocast as its documentation shows."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.device.jobs import LR, DeviceJob
from benchmarks.peers import PreparedBatches
from loopkit import Fit, Task
from loopkit.optim import AdamW


def by_hand(job: DeviceJob) -> None:
    """Run the loop with copies that the host does not wait for."""
    model = job.clocked.to(job.device).train()
    if job.compile:
        model.model.compile()
    optimizer = job.optimizer()
    for host in job.batches:
        batch = {name: value.to(job.device, non_blocking=True) for name, value in host.items()}
        with torch.autocast(job.device, torch.bfloat16):
            loss = model(**batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class DeviceTask(Task):
    """The job as a Task."""

    def __init__(self, job: DeviceJob) -> None:
        super().__init__()
        self.job, self.clocked = job, job.clocked

    def train_step(self, batch: dict[str, Any]) -> Any:
        return self.clocked(**batch)

    def optimizers(self) -> Any:
        return AdamW(lr=LR, weight_decay=0.01, no_decay=())

    def train_data(self) -> Any:
        return self.job.batches


def loopkit(job: DeviceJob, **changed: Any) -> None:
    """Run Fit, without logs and files; ``changed`` are further arguments."""
    options: dict[str, Any] = {
        "loggers": None, "progress": False, "checkpoint": False, "log_every": "never",
        "accelerator": job.device, "precision": "bf16", "compile": job.compile,
    }  # fmt: skip
    Fit(**{**options, **changed}).run(DeviceTask(job))


def lightning(job: DeviceJob) -> None:
    """Run Lightning's Trainer."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.clocked = job.clocked

        def training_step(self, batch: Any, index: int) -> Any:
            return self.clocked(**batch)

        def configure_optimizers(self) -> Any:
            return job.optimizer()

    if job.compile:
        job.clocked.model.compile()
    trainer = pl.Trainer(
        accelerator=job.device, devices=1, max_epochs=1, precision="bf16-mixed", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), PreparedBatches(job.batches))


def transformers(job: DeviceJob) -> None:
    """Run Hugging Face's Trainer."""
    from transformers import Trainer, TrainingArguments

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.clocked = job.clocked

        # Trainer passes this too.
        def forward(self, num_items_in_batch: Any = None, **batch: Any) -> dict[str, Any]:
            return {"loss": self.clocked(**batch)}

    class Direct(Trainer):
        def get_train_dataloader(self) -> Any:
            return job.batches

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=len(job.batches), use_cpu=job.device == "cpu", bf16=True,
            torch_compile=job.compile, max_grad_norm=0.0, lr_scheduler_type="constant",
            save_strategy="no", logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        outer = Outer().to(job.device)
        Direct(outer, arguments, optimizers=(job.optimizer(), None)).train()


def accelerate(job: DeviceJob) -> None:
    """Run a loop around Accelerate's wrappers."""
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="bf16", cpu=job.device == "cpu")
    if job.compile:
        job.clocked.model.compile()
    model = job.clocked.to(accelerator.device).train()
    model, optimizer = accelerator.prepare(model, job.optimizer())
    for host in job.batches:
        batch = {name: value.to(job.device, non_blocking=True) for name, value in host.items()}
        loss = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()


CONTESTANTS = {
    "by hand": by_hand,
    "loopkit": loopkit,
    "lightning": lightning,
    "transformers": transformers,
    "accelerate": accelerate,
}
