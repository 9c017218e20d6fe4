"""Other frameworks as contestants, used as their documentation shows, with a fused AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.job import CLIP, LOG_EVERY, Job


class PreparedBatches:
    """The list of batches as one data loader. Lightning reads a list as several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def plain_trainer() -> Any:
    """Return Lightning's Trainer with nothing to see or to save, to evaluate or predict with."""
    import lightning.pytorch as pl

    return pl.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def lightning(job: Job) -> None:
    """Run Lightning's Trainer."""
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import TensorBoardLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(**batch)
            if job.full or job.bar:
                self.log("train/loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = job.optimizer()
            if not job.full:
                return optimizer
            return [optimizer], [{"scheduler": job.scheduler(optimizer), "interval": "step"}]

    class Counting(pl.Callback):
        def on_train_batch_end(self, *arguments: Any, **more: Any) -> None:
            job.hook()

    options: dict[str, Any] = {
        "callbacks": [Counting() for _ in range(job.hooks)],
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "enable_model_summary": False,
        "default_root_dir": str(job.folder),
        "log_every_n_steps": LOG_EVERY,
    }
    if job.full:
        options |= {"gradient_clip_val": CLIP, "logger": TensorBoardLogger(str(job.folder))}
    else:
        options |= {"logger": False, "enable_checkpointing": False, "enable_progress_bar": job.bar}
    pl.Trainer(**options).fit(Module(), PreparedBatches(job.data))


def transformers(job: Job) -> None:
    """Run Hugging Face's Trainer."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def forward(self, x: Any, labels: Any) -> dict[str, Any]:
            return {"loss": self.model(x, labels)}

    class Direct(Trainer):
        def get_train_dataloader(self) -> Any:
            return job.data

    class Counting(TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            job.hook()

    options: dict[str, Any] = {
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": not job.bar,
    }
    if job.bar:
        options |= {"logging_strategy": "steps", "logging_steps": LOG_EVERY}
    if job.full:
        options = {
            "save_strategy": "steps", "save_steps": job.steps, "logging_steps": LOG_EVERY, "disable_tqdm": False,
            "report_to": ["tensorboard"],
        }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        max_steps=job.steps,
        use_cpu=True,
        max_grad_norm=CLIP if job.full else 0.0,
        lr_scheduler_type="constant",
        **options,
    )
    optimizer = job.optimizer()
    scheduler = job.scheduler(optimizer) if job.full else None
    callbacks: list[Any] = [Counting() for _ in range(job.hooks)]
    Direct(Outer(), arguments, optimizers=(optimizer, scheduler), callbacks=callbacks).train()


def accelerate(job: Job) -> None:
    """Run a hand-written loop around Accelerate's wrappers."""
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(
        cpu=True, log_with="tensorboard" if job.full else None, project_dir=str(job.folder)
    )
    optimizer = job.optimizer()
    model, optimizer, scheduler = accelerator.prepare(
        job.model, optimizer, job.scheduler(optimizer)
    )
    if job.full:
        accelerator.init_trackers("run")
    for step, batch in enumerate(tqdm(job.data, disable=not (job.full or job.bar)), start=1):
        loss = model(**batch)
        accelerator.backward(loss)
        if job.full:
            accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        if job.full:
            scheduler.step()
        optimizer.zero_grad()
        if job.full and step % LOG_EVERY == 0:
            accelerator.log({"train/loss": loss.item(), "lr": scheduler.get_last_lr()[0]}, step)
    if job.full:
        accelerator.save_state(str(job.folder / "checkpoint"))
    accelerator.end_training()


def fabric(job: Job) -> None:
    """Run a hand-written loop around Fabric's wrappers."""
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import TensorBoardLogger
    from tqdm import tqdm

    runner = Fabric(
        accelerator="cpu",
        devices=1,
        loggers=TensorBoardLogger(str(job.folder)) if job.full else None,
    )
    model, optimizer = runner.setup(job.model, job.optimizer())
    scheduler = job.scheduler(optimizer) if job.full else None
    for step, batch in enumerate(tqdm(job.data, disable=not (job.full or job.bar)), start=1):
        loss = model(**batch)
        runner.backward(loss)
        if scheduler is not None:
            runner.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
            if step % LOG_EVERY == 0:
                runner.log_dict({"train/loss": loss.item(), "lr": scheduler.get_last_lr()[0]}, step)
    if job.full:
        runner.save(str(job.folder / "checkpoint.pt"), {"model": model, "optimizer": optimizer})


def ignite(job: Job) -> None:
    """Run Ignite's Engine."""
    from ignite.contrib.handlers import ProgressBar
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver, TensorboardLogger
    from ignite.handlers.tensorboard_logger import OutputHandler

    optimizer, parameters = job.optimizer(), list(job.model.parameters())

    def update(engine: Any, batch: Any) -> float:
        loss = job.model(**batch)
        loss.backward()
        if job.full:
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    trainer = Engine(update)
    if job.full:
        scheduler = job.scheduler(optimizer)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: scheduler.step())
        ProgressBar().attach(trainer, output_transform=lambda loss: {"loss": loss})
        logger = TensorboardLogger(log_dir=str(job.folder))
        handler = OutputHandler(tag="train", output_transform=lambda loss: {"loss": loss})
        logger.attach(trainer, handler, event_name=Events.ITERATION_COMPLETED(every=LOG_EVERY))
        disk = DiskSaver(str(job.folder), require_empty=False)
        trainer.add_event_handler(
            Events.COMPLETED, Checkpoint({"model": job.model, "optimizer": optimizer}, disk)
        )
    trainer.run(job.data, max_epochs=1)


def torchtnt(job: Job) -> None:
    """Run TorchTNT's AutoUnit."""
    from torchtnt.framework import AutoUnit, train
    from torchtnt.framework.callbacks import TQDMProgressBar
    from torchtnt.utils.loggers import TensorBoardLogger

    logger = TensorBoardLogger(str(job.folder)) if job.full else None

    class Unit(AutoUnit[Any]):
        def compute_loss(self, state: Any, data: Any) -> tuple[Any, Any]:
            return self.module(**data), None

        def configure_optimizers_and_lr_scheduler(self, module: Any) -> tuple[Any, Any]:
            optimizer = job.optimizer()
            return optimizer, job.scheduler(optimizer) if job.full else None

        def on_train_step_end(self, state: Any, data: Any, step: int, results: Any) -> None:
            if logger is not None and (step + 1) % LOG_EVERY == 0:
                logger.log("train/loss", results.loss.item(), step + 1)

    unit = Unit(
        module=job.model,
        device=torch.device("cpu"),
        step_lr_interval="step",
        clip_grad_norm=CLIP if job.full else None,
    )
    train(unit, job.data, max_epochs=1, callbacks=[TQDMProgressBar()] if job.full else [])
    if job.full:
        torch.save(unit.app_state(), job.folder / "checkpoint.pt")
