"""LightningModules in the manner of public ones, written for the tests; none knows loopkit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

pl = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

_draw = torch.Generator().manual_seed(0)
X = torch.randn(88, 8, generator=_draw)
Y = (X.sum(1) > 0).long() + (X[:, 0] > 1).long()
Z = torch.randn(40, 8, generator=_draw)


def loader(part=slice(0, 88), size=16, shuffle=True, seed=1):
    """A loader with a generator of its own, so that it draws nothing from torch's stream."""
    data = TensorDataset(X[part], Y[part])
    return DataLoader(data, size, shuffle=shuffle, generator=torch.Generator().manual_seed(seed))


def held_out(seed=2):
    return loader(slice(60, 88), shuffle=False, seed=seed)


class AutoEncoder(pl.LightningModule):
    """Its own loader, one optimizer by name, values of steps and of the epoch at once."""

    def __init__(self, width: int = 4, lr: float = 1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(8, width), nn.ReLU())
        self.decoder = nn.Sequential(nn.Dropout(0.1), nn.Linear(width, 8))

    def forward(self, x):
        return self.decoder(self.encoder(x))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        loss = F.mse_loss(self(x), x)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        return loss

    def validation_step(self, batch):
        self.log("val_loss", F.mse_loss(self(batch[0]), batch[0]), sync_dist=True)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self.encoder(batch[0])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return held_out()

    def predict_dataloader(self):
        return held_out()


class GAN(pl.LightningModule):
    """Manual optimization of two optimizers, with toggling and noise drawn in the step."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8))
        self.discriminator = nn.Sequential(nn.Linear(8, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def forward(self, z):
        return self.generator(z)

    def training_step(self, batch):
        real, _ = batch
        opt_g, opt_d = self.optimizers()
        z = torch.randn(len(real), 4).type_as(real)
        one, zero = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        self.toggle_optimizer(opt_g)
        g_loss = F.binary_cross_entropy_with_logits(self.discriminator(self(z)), one.type_as(real))
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        opt_g.step()
        opt_g.zero_grad()
        self.untoggle_optimizer(opt_g)
        self.toggle_optimizer(opt_d)
        d_real = F.binary_cross_entropy_with_logits(self.discriminator(real), one.type_as(real))
        fake = self.discriminator(self(z).detach())
        d_loss = (d_real + F.binary_cross_entropy_with_logits(fake, zero.type_as(real))) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        opt_d.step()
        opt_d.zero_grad()
        self.untoggle_optimizer(opt_d)

    def configure_optimizers(self):
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=2e-3, betas=(0.5, 0.999))
        return [opt_g, opt_d], []

    def train_dataloader(self):
        return loader()


class Classifier(pl.LightningModule):
    """Metric objects of three kinds, the best value so far, and a plateau that watches a value."""

    def __init__(self, net=None, rate: float = 0.05):
        super().__init__()
        self.save_hyperparameters(ignore=["net"])
        self.net = net or nn.Sequential(
            nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
        )
        self.criterion = nn.CrossEntropyLoss()
        self.train_acc = MulticlassAccuracy(3)
        self.val_acc = MulticlassAccuracy(3)
        self.train_loss, self.val_loss = MeanMetric(), MeanMetric()
        self.val_best = MaxMetric()
        self.more = MetricCollection(
            {"f1": MulticlassF1Score(3), "acc": MulticlassAccuracy(3, average="micro")},
            prefix="val/",
        )

    def on_train_start(self):
        if self.global_step == 0:
            self.val_best.reset()

    def model_step(self, batch):
        x, y = batch
        logits = self.net(x)
        return self.criterion(logits, y), logits.argmax(1), y

    def training_step(self, batch, batch_idx):
        loss, preds, y = self.model_step(batch)
        self.train_loss(loss)
        self.train_acc(preds, y)
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True, prog_bar=True)
        return {"loss": loss, "preds": preds}

    def validation_step(self, batch, batch_idx):
        loss, preds, y = self.model_step(batch)
        self.val_loss(loss)
        self.val_acc(preds, y)
        self.more.update(preds, y)
        self.log("val/loss", self.val_loss, on_step=False, on_epoch=True)
        self.log("val/acc_macro", self.val_acc, on_step=False, on_epoch=True)
        self.log_dict(self.more)

    def on_validation_epoch_end(self):
        self.val_best(self.val_acc.compute())
        self.log("val/acc_best", self.val_best.compute(), sync_dist=True, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.rate, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": plateau,
                "monitor": "val/loss",
                "interval": "epoch",
                "frequency": 1,
            },
        }

    def train_dataloader(self):
        return loader(slice(0, 60))

    def val_dataloader(self):
        return held_out()


class TwoLists(pl.LightningModule):
    """Two schedulers of one optimizer, by epochs and by every second step, from two lists."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self.layer(batch[0]), batch[1]), "extra": batch_idx}

    def on_train_epoch_end(self):
        self.log("norm", self.layer.weight.norm())

    def configure_optimizers(self):
        optimizer = torch.optim.RMSprop(self.parameters(), lr=0.02)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)
        by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return [optimizer], [by_epoch, {"scheduler": by_step, "interval": "step", "frequency": 2}]

    def train_dataloader(self):
        return loader()


class Teacher(pl.LightningModule):
    """A teacher that follows the student, updated after each batch and kept in a save hook."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.teacher = copy.deepcopy(self.student).eval()
        for parameter in self.teacher.parameters():
            parameter.requires_grad_(False)
        self.momentum = 0.9
        self.seen = 0

    def training_step(self, batch, batch_idx):
        x, y = batch
        noisy = x + 0.1 * torch.randn_like(x)
        with torch.no_grad():
            target = self.teacher(x).softmax(1)
        out = self.student(noisy)
        loss = F.cross_entropy(out, y) - self.momentum * (target * out.log_softmax(1)).sum(1).mean()
        self.log_dict({"loss": loss, "momentum": self.momentum}, on_epoch=True, on_step=False)
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen += len(batch[0])
        self.momentum = 1 - 0.1 * (math.cos(math.pi * self.global_step / 20) + 1) / 2
        with torch.no_grad():
            for new, old in zip(self.student.parameters(), self.teacher.parameters()):
                old.mul_(self.momentum).add_(new, alpha=1 - self.momentum)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["momentum"] = self.momentum
        checkpoint["seen"] = self.seen

    def on_load_checkpoint(self, checkpoint):
        self.momentum, self.seen = checkpoint["momentum"], checkpoint["seen"]

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.student.parameters(), lr=5e-3)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3),
        }

    def train_dataloader(self):
        return loader()


class Points(Dataset):
    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "y": self.y[index]}


class PointData(pl.LightningDataModule):
    """Prepared once, then set up by stage; it notes what was called."""

    def __init__(self, batch_size: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.calls = []

    @property
    def classes(self):
        return 3

    def prepare_data(self):
        self.calls.append("prepare")

    def setup(self, stage):
        self.calls.append(f"setup {stage}")
        self.mean = X[:60].mean(0)

    def make(self, part, seed, shuffle=False):
        data = Points(X[part] - self.mean, Y[part])
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(data, self.hparams.batch_size, shuffle=shuffle, generator=generator)

    def train_dataloader(self):
        return self.make(slice(0, 60), 1, shuffle=True)

    def val_dataloader(self):
        return self.make(slice(60, 88), 2)

    def test_dataloader(self):
        return [self.make(slice(60, 80), 3), self.make(slice(70, 88), 4)]

    def teardown(self, stage):
        self.calls.append(f"teardown {stage}")


class OfDataModule(pl.LightningModule):
    """Builds its head from the data module in setup, and counts steps by the trainer's estimate."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.2))

    def setup(self, stage):
        if not hasattr(self, "head"):
            self.head = nn.Linear(8, self.trainer.datamodule.classes)

    def shared(self, batch, name):
        logits = self.head(self.body(batch["x"]))
        loss = F.cross_entropy(logits, batch["y"])
        self.log(f"{name}/loss", loss, batch_size=len(batch["x"]))
        self.log(
            f"{name}/acc",
            (logits.argmax(1) == batch["y"]).float().mean(),
            batch_size=len(batch["x"]),
        )
        return loss

    def training_step(self, batch, batch_idx):
        return self.shared(batch, "train")

    def validation_step(self, batch, batch_idx):
        return self.shared(batch, "val")

    def test_step(self, batch, batch_idx, dataloader_idx):
        return self.shared(batch, "test")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        total = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-2, total_steps=total)
        return [
            {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        ]


class SeveralSets(pl.LightningModule):
    """Two validation loaders; the second is measured against a bank that the first one fills."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.bank = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def on_validation_epoch_start(self):
        self.bank = []

    def validation_step(self, batch, batch_idx, dataloader_idx):
        logits = self.layer(batch[0])
        self.log("val_loss", F.cross_entropy(logits, batch[1]))
        if dataloader_idx == 0:
            self.bank.append(logits)
        else:
            near = torch.cdist(logits, torch.cat(self.bank)).min(1).values.mean()
            self.log("distance", near, add_dataloader_idx=False)

    def configure_optimizers(self):
        return (torch.optim.Adam(self.layer.parameters(), lr=0.02),)

    def train_dataloader(self):
        return loader(slice(0, 60))

    def val_dataloader(self):
        return [loader(slice(0, 30), shuffle=False, seed=4), held_out()]


class Painter(pl.LightningModule):
    """Draws by the logger's own object, and overrides ``optimizer_step`` for a warm-up."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.drawn = 0

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch[0]) - batch[0]).square().mean()
        self.log("train_loss", loss, reduce_fx="max", on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.image = self.layer(batch[0])[None].sigmoid()

    def on_validation_epoch_end(self):
        if self.logger:
            self.logger.experiment.add_image("outputs", self.image, self.current_epoch)
        self.drawn += 1

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.step(closure=optimizer_closure)
        scale = min(1.0, (self.trainer.global_step + 1) / 6)
        for group in optimizer.param_groups:
            group["lr"] = scale * 0.03

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.005)

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return held_out()


class ByHand(pl.LightningModule):
    """Accumulates over batches by hand, clips, and steps its scheduler itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        loss = F.cross_entropy(self.net(batch[0]), batch[1]) / 2
        self.manual_backward(loss)
        if (batch_idx + 1) % 2 == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
        self.log("loss", loss, on_epoch=True)

    def on_train_epoch_end(self):
        self.lr_schedulers().step()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    def train_dataloader(self):
        return loader()


class Counter(pl.Callback):
    """A callback with a state, which changes the learning rate by it."""

    def __init__(self):
        self.batches, self.events = 0, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.02 / (1 + self.batches / 4)

    def on_train_epoch_end(self, trainer, pl_module):
        self.events.append((trainer.current_epoch, trainer.global_step))
        pl_module.log("batches", float(self.batches))

    def state_dict(self):
        return {"batches": self.batches, "events": self.events}

    def load_state_dict(self, state):
        self.batches, self.events = state["batches"], [tuple(each) for each in state["events"]]


class Simple(pl.LightningModule):
    """No validation at all; hooks around the backward pass."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 3)
        self.order = []

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    def on_train_batch_start(self, batch, batch_idx):
        self.order.append("start")

    def on_after_backward(self):
        self.order.append("backward")
        self.log("grad", self.layer.weight.grad.norm())

    def on_before_optimizer_step(self, optimizer):
        self.order.append(type(optimizer).__name__)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.order.append(sorted(outputs))

    def configure_optimizers(self):
        return [torch.optim.Adagrad(self.parameters(), lr=0.02)]

    def train_dataloader(self):
        return loader()


# name -> (module, data module, callbacks)
CASES = {
    "autoencoder": lambda: (AutoEncoder(), None, []),
    "gan": lambda: (GAN(), None, []),
    "classifier": lambda: (Classifier(), None, []),
    "two lists": lambda: (TwoLists(), None, []),
    "teacher": lambda: (Teacher(), None, []),
    "data module": lambda: (OfDataModule(), PointData(), []),
    "several sets": lambda: (SeveralSets(), None, []),
    "painter": lambda: (Painter(), None, []),
    "by hand": lambda: (ByHand(), None, []),
    "callback": lambda: (Simple(), None, [Counter()]),
}


def made(name: str):
    """The module, data module and callbacks of a case, with the same weights each time."""
    torch.manual_seed(5)
    return CASES[name]()
