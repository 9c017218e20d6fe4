"""LightningTask: unmodified LightningModules have Lightning's own losses, and resume exactly."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from loopkit import Fit  # noqa: E402
from loopkit.interop import LightningTask  # noqa: E402
from tests.interop import lightning_modules as public  # noqa: E402

EPOCHS = 3


class Recorder(pl.Callback):
    """Seeds before the set-up, as Fit does, and records the parameters before each batch."""

    def __init__(self, weights):
        self.weights = weights

    def setup(self, *_, stage):
        torch.manual_seed(0)

    def on_train_batch_start(self, trainer, module, *_):
        self.weights.append(fingerprint(module))


def fingerprint(module):
    return float(sum(p.double().sum() for p in module.parameters()))


def with_lightning(name, tmp_path, **options):
    module, data, callbacks = public.made(name)
    weights = []
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_epochs=EPOCHS,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, Recorder(weights)],
            **options,
        )
        trainer.fit(module, datamodule=data)
    return module, weights, {name: float(value) for name, value in trainer.callback_metrics.items()}


def fit(run_dir, **options):
    defaults = {
        "epochs": EPOCHS, "rng": "stream", "seed": 0, "progress": False, "loggers": None, "accelerator": "cpu",
        "checkpoint": False, "log_every": 1, "run_dir": run_dir, "strategy": "single",
    }  # fmt: skip
    return Fit(**{**defaults, **options})


def with_loopkit(name, run_dir, stop=None, **options):
    module, data, callbacks = public.made(name)
    weights = []
    task = LightningTask(module, data, callbacks=callbacks)
    made = fit(run_dir, **options)
    made.on("step_start", lambda run, batches: weights.append(fingerprint(module)))
    if stop is not None:
        made.on(
            "step_end", lambda run, out: run.stop("test") if run.progress.step == stop else None
        )
    return task, weights, made.run(task)


@pytest.mark.parametrize("name", public.CASES)
def test_every_step_has_the_bits_of_lightning_itself(name, tmp_path):
    theirs, their_weights, their_metrics = with_lightning(name, tmp_path)
    task, weights, result = with_loopkit(name, tmp_path / "run")
    assert weights == their_weights
    assert len(set(weights)) > EPOCHS
    for key, value in theirs.state_dict().items():
        assert torch.equal(task.state_dict()[key], value), key
    ours = {key: float(value) for key, value in task.view.callback_metrics.items()}
    assert ours.keys() == their_metrics.keys()
    assert ours == pytest.approx(their_metrics, rel=1e-5)
    assert task.module.trainer.current_epoch == EPOCHS
    assert result.status == "finished"


@pytest.mark.parametrize("name", public.CASES)
def test_a_stopped_run_ends_with_the_same_bits(name, tmp_path):
    saves = {"checkpoint": True, "loggers": ["jsonl", "tensorboard"], "rng": "counter"}
    whole, weights, result = with_loopkit(name, tmp_path / "whole", **saves)
    for stop in (3, 6, 8):  # in an epoch, after its end, and in the next
        run_dir = tmp_path / str(stop)
        _, first, _ = with_loopkit(name, run_dir, stop=stop, **saves)
        task, rest, resumed = with_loopkit(name, run_dir, resume="auto", **saves)
        assert first + rest == weights
        for key, value in whole.state_dict().items():
            assert torch.equal(task.state_dict()[key], value), key
        assert rows(resumed) == rows(result)
        if name == "teacher":
            assert task.module.seen == whole.module.seen == 88 * EPOCHS


def rows(result):
    drop = ("runtime", "per_second")
    return [{k: v for k, v in row.items() if not k.endswith(drop)} for row in result.history]
