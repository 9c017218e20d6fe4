"""Each hook of Lightning is called, or refused by name; skipped batches; files of checkpoints."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from lightning.pytorch.core import hooks  # noqa: E402

from loopkit.errors import TaskError  # noqa: E402
from loopkit.interop import LightningTask  # noqa: E402
from tests.interop import lightning_modules as public  # noqa: E402
from tests.interop import test_lightning as lightning  # noqa: E402
from tests.interop.test_lightning_behaviour import Bare, subclass  # noqa: E402

HOOKS = sorted(
    name
    for kind in (hooks.ModelHooks, hooks.DataHooks, hooks.CheckpointHooks)
    for name in vars(kind)
    if not name.startswith("_")
)


def all_stages(tmp_path, task):
    """Train with a checkpoint, resume, evaluate, test and predict."""
    made = lightning.fit(tmp_path / "run", epochs=1, checkpoint=True)
    made.run(task)
    lightning.fit(tmp_path / "run", epochs=2, checkpoint=True, resume="auto").run(task)
    made = lightning.fit(tmp_path / "more")
    made.evaluate(task), made.test(task), made.predict(task)


class Everything(Bare):
    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.layer(batch[0])

    def val_dataloader(self):
        return public.held_out()

    test_dataloader = predict_dataloader = val_dataloader


def recording(kind, names, called):
    """Return an object of a class derived from ``kind`` that notes which of its methods are called."""

    def method(name):
        def call(self, *arguments, **keywords):
            called.add(name)
            return getattr(super(made, self), name)(*arguments, **keywords)

        return call

    made = type("Recording", (kind,), {name: method(name) for name in names})
    return made()


def test_each_hook_of_a_module_and_a_callback_is_called_or_refused(tmp_path):
    refused, called = set(), set()
    for name in HOOKS:
        try:
            LightningTask(subclass(**{name: lambda self, *a, **k: None}))
        except TaskError as error:
            said = str(error)
        else:
            continue
        assert f"Changed.{name} is never called" in said
        refused.add(name)
    events = [
        name for name in vars(pl.Callback) if not name.startswith("_") and name != "state_key"
    ]
    called_back: set[str] = set()
    module = recording(Everything, set(HOOKS) - refused, called)
    callback = recording(pl.Callback, events, called_back)
    task = LightningTask(module, callbacks=[callback])
    all_stages(tmp_path, task)
    with pytest.raises(ZeroDivisionError):
        module.on_train_start = lambda: 1 / 0
        lightning.fit(tmp_path / "fails", epochs=1).run(task)
    assert called == set(HOOKS) - refused
    never = {"on_sanity_check_start", "on_sanity_check_end"}  # there is no sanity check
    assert called_back == set(events) - never - ({"load_state_dict"} - called_back)


def test_what_a_data_module_overrides_in_vain_is_refused():
    data = type("Data", (pl.LightningDataModule,), {"on_before_batch_transfer": lambda *_: None})
    with pytest.raises(TaskError, match=r"Data\.on_before_batch_transfer is never called"):
        LightningTask(Bare(), data())


class Skips(pl.LightningModule):
    """Leaves out each third batch, with momentum and a scheduler by steps."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return None if batch_idx % 3 == 1 else F.cross_entropy(self.layer(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def train_dataloader(self):
        return public.loader(slice(0, 80))


class StepsItself(Skips):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        optimizer.step(closure=optimizer_closure)


@pytest.mark.filterwarnings("ignore:.*training_step")
@pytest.mark.parametrize("kind", [Skips, StepsItself])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_batch_has_the_bits_of_lightning_itself(tmp_path, monkeypatch, kind, accumulate):
    def made(name):
        torch.manual_seed(3)
        return kind(), None, []

    monkeypatch.setattr(public, "made", made)
    accumulated = {"accumulate_grad_batches": accumulate} if accumulate > 1 else {}
    theirs, weights, _ = lightning.with_lightning("skips", tmp_path, **accumulated)
    task, ours, _ = lightning.with_loopkit("skips", tmp_path / "run", accumulate=accumulate)
    assert ours == weights[::accumulate] or accumulate > 1
    for key, value in theirs.state_dict().items():
        assert torch.equal(task.state_dict()[key], value), key


def test_a_checkpoint_that_a_callback_saves_opens_in_lightning(tmp_path):
    class Saving(pl.Callback):
        def on_train_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "deep" / "last.ckpt")

    module = public.AutoEncoder(width=5)
    lightning.fit(tmp_path / "run", epochs=1).run(LightningTask(module, callbacks=[Saving()]))
    again = public.AutoEncoder.load_from_checkpoint(tmp_path / "deep" / "last.ckpt")
    assert again.hparams.width == 5
    assert torch.equal(again.encoder[0].weight, module.encoder[0].weight)


def test_an_optimizer_that_computes_gradients_itself_is_refused(tmp_path):
    module = subclass(configure_optimizers=lambda self: torch.optim.LBFGS(self.parameters()))
    with pytest.raises(TaskError, match=r"LBFGS.*ClosureStep"):
        lightning.fit(tmp_path).run(LightningTask(module))
