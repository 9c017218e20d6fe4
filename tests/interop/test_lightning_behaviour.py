"""LightningTask: names and averages of logged values, data modules, other stages, and refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from loopkit import Checkpoint, Fit  # noqa: E402
from loopkit.errors import CheckpointError, LoopkitWarning, OptionError, TaskError  # noqa: E402
from loopkit.interop import LightningTask  # noqa: E402
from tests.interop import lightning_modules as public  # noqa: E402
from tests.interop.test_lightning import fit  # noqa: E402


class Bare(pl.LightningModule):
    """The least that trains; subclasses add one thing each."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return public.loader(slice(0, 40), shuffle=False)


class Logging(Bare):
    def training_step(self, batch, batch_idx):
        step = float(self.trainer.global_step)
        self.log("both", step, on_step=True, on_epoch=True)
        self.log("last", step)
        self.log("largest", step, on_step=False, on_epoch=True, reduce_fx=torch.max)
        self.log("weighted", step, on_step=False, on_epoch=True, batch_size=1 + 9 * batch_idx)
        self.log("hidden", step, logger=False)
        self.log("of rank 0", step, rank_zero_only=True, sync_dist=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("set", float(dataloader_idx))
        self.log(f"own{dataloader_idx}", float(batch_idx), add_dataloader_idx=False)

    def val_dataloader(self):
        return {"near": public.held_out(), "far": public.loader(slice(0, 40))}


def test_values_have_lightnings_names_and_meaning(tmp_path):
    result = fit(tmp_path, epochs=1, log_every="2 steps").run(LightningTask(Logging()))
    assert (
        result.history[1]["both_step"] == result.history[1]["last"] == 1.0
    )  # the step's own value
    metrics = result.metrics
    assert metrics["both_epoch"] == pytest.approx((16 * 0 + 16 * 1 + 8 * 2) / 40)
    assert metrics["largest"] == 2.0
    assert metrics["weighted"] == pytest.approx((0 * 1 + 1 * 10 + 2 * 19) / 30)
    assert metrics["set/dataloader_idx_0"] == 0.0
    assert metrics["set/dataloader_idx_1"] == 1.0
    assert metrics["own0"] == pytest.approx((0 * 16 + 1 * 12) / 28)
    assert "hidden" not in metrics
    assert "of rank 0" in metrics
    assert "train/loss" not in metrics


def test_the_stages_of_a_data_module_are_those_that_are_asked_for(tmp_path):
    module, data, _ = public.made("data module")
    task = LightningTask(module, data)
    result = fit(tmp_path / "a").run(task)
    assert data.calls == ["prepare", "setup fit", "teardown fit"]
    assert result.metrics["val/acc"] > 0.4
    found = fit(tmp_path / "b").test(task)
    assert data.calls[-1] == "setup test"
    assert {"test/loss/dataloader_idx_0", "test/acc/dataloader_idx_1"} <= found.keys()
    measured = fit(tmp_path / "c").evaluate(task)
    assert data.calls[-1] == "setup validate"
    assert measured["val/loss"] == pytest.approx(result.metrics["val/loss"])


def test_predictions_are_those_of_predict_step(tmp_path):
    module, _, _ = public.made("autoencoder")
    made = fit(tmp_path).predict(LightningTask(module))
    module.eval()
    assert torch.allclose(made, module.encoder(public.X[60:88]))


def test_checkpoints_have_the_modules_own_names_and_decide_by_its_own_values(tmp_path):
    saves = Checkpoint(best="val/acc_best:max", load_best=False)
    task = LightningTask(public.made("classifier")[0])
    result = fit(tmp_path, checkpoint=saves).run(task)
    assert result.best["metric"] == "val/acc_best"
    assert task.state_dict().keys() == task.module.state_dict().keys()
    fresh = public.Classifier()
    again = LightningTask.load(result.checkpoint, module=fresh)
    for key, value in task.module.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], value)
    assert fit(tmp_path / "b").evaluate(again)["val/loss"] == result.metrics["val/loss"]


def test_the_device_and_type_of_the_module_follow_the_task():
    task = LightningTask(Bare())
    task.to(torch.float64)
    assert task.module.dtype == torch.float64
    task.to("meta")
    task.to_empty(device="cpu")
    assert task.module.device == torch.device("cpu")


def test_a_module_of_the_older_package_runs_as_well(tmp_path):
    old = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Old(old.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.layer = nn.Linear(8, 3)

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            loss = F.cross_entropy(self.layer(batch[0]), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.log("loss", loss)

        configure_optimizers = Bare.configure_optimizers
        train_dataloader = Bare.train_dataloader

    result = fit(tmp_path, epochs=4).run(LightningTask(Old()))
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert losses[-1] < losses[0]


def test_lightnings_own_resume_in_an_epoch_is_another_run(tmp_path):
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "num_sanity_val_steps": 0, "default_root_dir": tmp_path,
    }  # fmt: skip

    def train(epochs=2, resume=None, **options):
        torch.manual_seed(5)
        module = public.AutoEncoder()
        trainer = pl.Trainer(max_epochs=epochs, **quiet, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            trainer.fit(module, ckpt_path=resume)
        return module, trainer

    whole, _ = train()
    _, stopped = train(max_steps=3)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = train(resume=tmp_path / "half.ckpt")
    assert not torch.equal(resumed.encoder[0].weight, whole.encoder[0].weight)


def subclass(**methods):
    return type("Changed", (Bare,), methods)()


@pytest.mark.parametrize(
    ("method", "function", "instead"),
    [
        ("training_epoch_end", lambda self, outputs: None, "on_train_epoch_end"),
        ("validation_epoch_end", lambda self, outputs: None, "on_validation_epoch_end"),
        ("backward", lambda self, loss: None, "manual_backward"),
        ("lr_scheduler_step", lambda self, scheduler, metric: None, "manual optimization"),
        ("optimizer_zero_grad", lambda self, *a: None, "cleared after each update"),
        ("configure_gradient_clipping", lambda self, *a: None, "clip_norm"),
        ("training_step", lambda self, batch, batch_idx, optimizer_idx: None, "several optimizers"),
        ("training_step", lambda self, dataloader_iter: None, "batch and batch_idx"),
    ],
)
def test_what_is_left_out_is_named_before_the_run(method, function, instead):
    with pytest.raises(TaskError, match=rf"Changed\.{method}.*{instead}"):
        LightningTask(subclass(**{method: function}))


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (lambda m: None, "returned None"),
        (lambda m: [sgd(m), sgd(m)], "automatic_optimization = False"),
        (lambda m: {"lr_scheduler": 1}, "without 'optimizer'"),
        (lambda m: {"optimizer": sgd(m), "sheduler": 1}, "Did you mean"),
        (lambda m: ([o := sgd(m)], [{"scheduler": plateau(o)}]), "watches nothing"),
        (lambda m: ([o := sgd(m)], [{"scheduler": step(o), "intervall": "step"}]), "interval"),
        (lambda m: ([o := sgd(m)], [{"scheduler": step(o), "interval": "batch"}]), "'step' or 'epoch'"),
        (lambda m: ([sgd(m)], [step(sgd(m))]), "of an optimizer that it did not return"),
        (lambda m: {"optimizer": (o := sgd(m)), "lr_scheduler": plateau(o), "monitor": "none"}, "watches 'none'"),
    ],
)  # fmt: skip
def test_optimizers_that_cannot_be_stepped_are_refused(returned, reason, tmp_path):
    module = subclass(configure_optimizers=returned)
    with pytest.raises(TaskError, match=reason):
        fit(tmp_path, epochs=1).run(LightningTask(module))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def plateau(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def step(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


def test_other_objects_callbacks_options_and_states_are_refused(tmp_path):
    with pytest.raises(TaskError, match="no LightningModule"):
        LightningTask(nn.Linear(2, 2))
    with pytest.raises(TaskError, match="EarlyStop"):
        LightningTask(Bare(), callbacks=[pl.callbacks.EarlyStopping("val_loss")])
    with pytest.raises(TaskError, match=r"returned \{\}, with no loss"):
        fit(tmp_path / "a").run(LightningTask(subclass(training_step=lambda self, batch: {})))
    by_hand = LightningTask(public.made("by hand")[0])
    with pytest.raises(OptionError, match="leave accumulate"):
        fit(tmp_path / "b", accumulate=2).run(by_hand)
    saved = subclass(on_save_checkpoint=lambda self, saved: saved.update(odd=object()))
    with pytest.raises(CheckpointError, match="on_save_checkpoint"):
        fit(tmp_path / "c", checkpoint=True).run(LightningTask(saved))
    asks = subclass(on_train_start=lambda self: self.trainer.fit_loop)
    with pytest.raises(AttributeError, match=r"has no 'fit_loop': it has .*current_epoch"):
        fit(tmp_path / "d").run(LightningTask(asks))


def test_parameters_of_no_optimizer_are_frozen_and_named(tmp_path):
    module = Bare()
    module.rest = nn.Linear(2, 2)
    module.configure_optimizers = lambda: torch.optim.SGD(module.layer.parameters(), lr=0.1)
    with pytest.warns(LoopkitWarning, match=r"rest\.weight, rest\.bias to no optimizer"):
        fit(tmp_path).run(LightningTask(module))
    assert not module.rest.weight.requires_grad


def test_a_dry_run_leaves_the_module_as_it_was(tmp_path):
    module = public.made("classifier")[0]
    before = {key: value.clone() for key, value in module.state_dict().items()}
    task = LightningTask(module)
    Fit(dry_run=True, progress=False, loggers=None, accelerator="cpu").run(task)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert module.trainer is task.view
