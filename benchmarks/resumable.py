"""One training that is stopped and resumed, in each framework, as its documentation shows.

    python benchmarks/resumable.py FRAMEWORK FOLDER STEPS [resume]

prints a JSON object: the step that the process began from, and a digest of the last weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

BATCH, SAVE_EVERY, WIDTH, SAMPLES = 8, 5, 768, 64


class Noisy(Dataset[dict[str, Tensor]]):
    """Samples that get new noise each time they are read: 8 steps are an epoch of 64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, 16, generator=generator)
        self.y = self.x.sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index] + 0.1 * torch.randn(16), "labels": self.y[index]}


class Net(nn.Module):
    """A network with dropout that returns its loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        inner = [nn.Linear(16, WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, WIDTH)]
        self.layers = nn.Sequential(*inner, nn.ReLU(), nn.Linear(WIDTH, 1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x), labels)}

    def optimizer(self) -> torch.optim.Optimizer:
        """Return AdamW over the parameters."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def loopkit(net: Net, folder: Path, steps: int, *, resume: bool) -> int:
    """Run loopkit."""
    from loopkit import Checkpoint, Fit, Loader, Task

    class Job(Task):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def train_step(self, batch: Any) -> Any:
            return self.net(**batch)["loss"]

        def optimizers(self) -> Any:
            return net.optimizer()

        def train_data(self) -> Any:
            return Loader(Noisy(), batch_size=BATCH, shuffle=True)

    fit = Fit(
        steps=steps,
        run_dir=folder,
        resume="auto" if resume else None,
        checkpoint=Checkpoint(every=f"{SAVE_EVERY} steps", keep=10),
        progress=False,
        loggers=False,
    )
    began: list[int] = []
    fit.on("fit_start", lambda run: began.append(run.progress.step))
    fit.run(Job())
    return began[0]


def trainer(net: Net, folder: Path, steps: int, *, resume: bool) -> int:
    """Run the Trainer of transformers."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    began: list[int] = []

    class Begins(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            began.append(state.global_step)

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        save_steps=SAVE_EVERY,
        lr_scheduler_type="constant",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        max_grad_norm=0.0,
        learning_rate=1e-3,
        weight_decay=0.01,
    )
    job = Trainer(net, arguments, train_dataset=Noisy(), callbacks=[Begins()])
    job.train(resume_from_checkpoint=resume or None)
    return began[0]


def lightning(net: Net, folder: Path, steps: int, *, resume: bool) -> int:
    """Run Lightning's Trainer."""
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    began: list[int] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, index: int) -> Any:
            began.append(self.global_step)
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> Any:
            return net.optimizer()

    saves = ModelCheckpoint(folder, every_n_train_steps=SAVE_EVERY, save_top_k=-1, save_last=True)
    pl.seed_everything(0, verbose=False)
    pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[saves],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(
        Module(),
        DataLoader(Noisy(), BATCH, shuffle=True),
        ckpt_path="last" if resume else None,
    )
    return began[0]


def accelerate(net: Net, folder: Path, steps: int, *, resume: bool) -> int:
    """Run a loop around Accelerate, resumed by ``skip_first_batches``."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(0)
    accelerator = Accelerator(cpu=True)
    model, optimizer, data = accelerator.prepare(
        net, net.optimizer(), DataLoader(Noisy(), BATCH, shuffle=True)
    )
    step = 0
    if resume:
        newest = max(folder.glob("step_*"), key=lambda path: int(path.name.rpartition("_")[2]))
        accelerator.load_state(str(newest))
        step = int(newest.name.rpartition("_")[2])
    began = step
    while step < steps:
        batches = accelerator.skip_first_batches(data, step % len(data)) if resume else data
        resume = False
        for batch in batches:
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % SAVE_EVERY == 0:
                accelerator.save_state(str(folder / f"step_{step}"))
            if step == steps:
                break
    return began


def dcp(net: Net, folder: Path, steps: int, *, resume: bool) -> int:
    """Run a loop by hand that saves with torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    optimizer, step = net.optimizer(), 0
    torch.manual_seed(0)
    if resume:
        newest = max(folder.glob("step_*"), key=lambda path: int(path.name.rpartition("_")[2]))
        model_state, optimizer_state = get_state_dict(net, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        checkpoint.load(state, checkpoint_id=str(newest))
        set_state_dict(
            net,
            optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        step = int(newest.name.rpartition("_")[2])
    began = step
    while step < steps:
        data = DataLoader(Noisy(), BATCH, shuffle=True)
        for number, batch in enumerate(data):
            if number < step % len(data):
                continue
            net(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % SAVE_EVERY == 0:
                model_state, optimizer_state = get_state_dict(net, optimizer)
                checkpoint.save(
                    {"model": model_state, "optimizer": optimizer_state},
                    checkpoint_id=str(folder / f"step_{step}"),
                )
            if step == steps:
                break
    return began


FRAMEWORKS = {
    "loopkit": loopkit,
    "Trainer": trainer,
    "Lightning": lightning,
    "accelerate": accelerate,
    "DCP": dcp,
}


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint of the highest step in a folder of any framework: a folder or a file."""
    found: dict[int, Path] = {}
    for path in [*folder.glob("checkpoint*"), *folder.glob("*step*"), *folder.glob("*/step-*")]:
        digits = "".join(c if c.isdigit() else " " for c in path.stem).split()
        if digits and path.suffix in ("", ".ckpt"):
            found[int(digits[-1])] = path
    return found[max(found)] if found else None


def kill_during_save(folder: Path, after: float) -> None:
    """End this process ``after`` seconds from when the first file of the third save is there."""
    second = folder / "checkpoints" / "step-000000000010"  # loopkit writes under another name first

    def has_begun() -> bool:
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        return any("15" in name or (".staging" in name and second.exists()) for name in names)

    def watch() -> None:
        while not has_begun():
            time.sleep(0.0002)
        time.sleep(after)
        os.kill(os.getpid(), 9)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Train in one framework, and print what came out."""
    name, folder, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if "KILL_AFTER" in os.environ:
        kill_during_save(folder, float(os.environ["KILL_AFTER"]))
    net = Net()
    began = FRAMEWORKS[name](net, folder, steps, resume="resume" in sys.argv[4:])
    digest = hashlib.sha256()
    for parameter in net.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    print(json.dumps({"began": began, "digest": digest.hexdigest()}))


if __name__ == "__main__":
    main()
