"""``loopkit fit`` and ``evaluate`` on a file that holds a LightningModule."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from loopkit.cli.main import main

FILE = '''
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Line(pl.LightningModule):
    """A line through points."""

    def __init__(self, width: int = 1, lr: float = 0.1):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("distance", self.training_step(batch, batch_idx))
        self.log("width", float(self.hparams.width))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
'''
DATA = """

class Points(pl.LightningDataModule):
    def setup(self, stage):
        self.data = TensorDataset(torch.ones(12, 3), torch.full((12, 1), 2.0))

    def train_dataloader(self):
        return DataLoader(self.data, 4)

    val_dataloader = train_dataloader
"""


def test_a_module_with_its_data_module_trains_and_evaluates(tmp_path, capsys):
    file, run = tmp_path / "line.py", str(tmp_path / "run")
    file.write_text(FILE + DATA)
    options = ["--accelerator", "cpu", "--width", "3"]
    assert (
        main(["fit", str(file), "--epochs", "4", "--run-dir", run, "--progress", "false", *options])
        == 0
    )
    capsys.readouterr()
    assert main(["evaluate", f"{file}:Line", "--checkpoint", run, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["width"] == 3
    assert found["distance"] < 0.01


def test_two_data_modules_of_a_file_are_refused(tmp_path, capsys):
    file = tmp_path / "lines.py"
    file.write_text(FILE + DATA + DATA.replace("Points", "Others"))
    assert main(["fit", str(file)]) == 2
    assert "2 data modules, Points, Others" in capsys.readouterr().err
