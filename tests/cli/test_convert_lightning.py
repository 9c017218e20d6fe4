"""convert-args for Lightning: every argument is carried over or listed, and the script runs as printed."""

from __future__ import annotations

import inspect
import io
import runpy
import sys

import pytest
import torch

from loopkit.cli.convert_args import converted
from loopkit.cli.lightning_args import callbacks, places
from loopkit.cli.lightning_args.signatures import SIGNATURES
from loopkit.cli.main import main
from loopkit.errors import OptionError

# For each argument of the Trainer, a call with another value than the default.
CHANGED = {
    "accelerator": "'gpu'", "strategy": "'fsdp'", "devices": "2", "num_nodes": "2", "precision": "'bf16-mixed'",
    "logger": "False", "callbacks": "[LearningRateMonitor()]", "fast_dev_run": "3", "max_epochs": "3",
    "min_epochs": "2", "max_steps": "9", "min_steps": "2", "max_time": "'00:00:30:00'",
    "limit_train_batches": "0.5", "limit_val_batches": "3", "limit_test_batches": "3",
    "limit_predict_batches": "3", "overfit_batches": "2", "val_check_interval": "0.5",
    "check_val_every_n_epoch": "2", "num_sanity_val_steps": "-1", "log_every_n_steps": "5",
    "enable_checkpointing": "False", "enable_progress_bar": "False", "enable_model_summary": "True",
    "accumulate_grad_batches": "4", "gradient_clip_val": "0.5", "gradient_clip_algorithm": "'value'",
    "deterministic": "'warn'", "benchmark": "True", "inference_mode": "False", "use_distributed_sampler": "False",
    "profiler": "'simple'", "detect_anomaly": "True", "barebones": "True", "plugins": "[DoublePrecision()]",
    "sync_batchnorm": "True", "reload_dataloaders_every_n_epochs": "1", "default_root_dir": "'out'",
    "enable_autolog_hparams": "False", "model_registry": "'models'",
}  # fmt: skip


def source(call):
    return converted(call, ".py").source()


def changed(default):
    """Return another value than the default of an argument, as source."""
    return {bool: not default, int: 7, float: 0.7, str: "'max'"}.get(type(default), "'00:00:30:00'")


def test_the_tables_are_those_of_the_installed_lightning():
    pl = pytest.importorskip("lightning.pytorch")
    homes = (pl, pl.callbacks, pl.loggers, pl.strategies, pl.plugins, pl.profilers)
    for name, table in SIGNATURES.items():
        kind = next(getattr(home, name) for home in homes if hasattr(home, name))
        parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
        own = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        assert [*table] == [p.name for p in own], name
        for parameter in own:
            if table[parameter.name] is not ...:
                assert table[parameter.name] == parameter.default, (name, parameter.name)
    bases = {
        "Callback",
        "Checkpoint",
        "LambdaCallback",
        "Logger",
        "LitLogger",
        "Strategy",
        "ParallelStrategy",
    }
    names = {*pl.callbacks.__all__, *pl.loggers.__all__, *pl.strategies.__all__} - bases
    assert not names - callbacks.known_callbacks() - places.known_places()


@pytest.mark.parametrize("name", SIGNATURES["Trainer"])
def test_each_argument_alone_is_carried_over_or_listed(name):
    beside = {"limit_test_batches": "limit_val_batches=1, "}.get(name, "")
    assert source(f"Trainer({beside}{name}={CHANGED[name]})") != source(f"Trainer({beside[:-2]})")


def test_each_argument_of_each_object_is_carried_over_or_listed():
    for name, table in SIGNATURES.items():
        if name == "Trainer":
            continue
        place = (
            "callbacks" if name in callbacks.known_callbacks()
            else "logger" if name.endswith("Logger") else "strategy" if name.endswith("Strategy")
            else "profiler" if name.endswith("Profiler") else "plugins"
        )  # fmt: skip
        needed = {
            n: "'bf16-mixed'" if n == "precision" else "'x'" for n, d in table.items() if d is ...
        }
        needed |= {"monitor": "'a'"} if name == "ModelCheckpoint" else {}
        shown = "Trainer({}={}({}))"
        for argument, default in table.items():
            if argument in ("precision", "duration"):
                continue
            both = [needed, {**needed, argument: changed(default if default is not ... else "")}]
            before, after = (
                source(shown.format(place, name, ", ".join(f"{n}={v}" for n, v in each.items())))
                for each in both
            )
            assert before != after or argument in needed, f"{name}({argument}=) is lost"


# Groups of arguments as scripts give them.
SCRIPTS = {
    "whole": """
        import lightning.pytorch as pl
        pl.seed_everything(42, workers=True)
        saved = ModelCheckpoint(dirpath="out", monitor="val_acc", mode="max", save_top_k=2)
        trainer = pl.Trainer(max_epochs=2, accelerator="cpu", devices=1, precision="bf16-mixed", callbacks=[
            saved, EarlyStopping("val_loss", patience=5), LearningRateMonitor("step"), RichModelSummary(max_depth=2)],
            logger=[CSVLogger("logs"), TensorBoardLogger("logs", name="x")], gradient_clip_val=1.0,
            accumulate_grad_batches=2, val_check_interval=0.5, benchmark=True, sync_batchnorm=True)
        trainer.fit(model, dm, ckpt_path="last")""",
    "averages": """Trainer(max_epochs=4, accelerator="cpu", num_sanity_val_steps=-1, callbacks=[
        StochasticWeightAveraging(1e-2, swa_epoch_start=0.5), TQDMProgressBar(), ThroughputMonitor(len)])""",
    "moving average": """Trainer(max_steps=6, accelerator="cpu", logger=False, log_every_n_steps=1,
        callbacks=EMAWeightAveraging(decay=0.9), enable_progress_bar=False, detect_anomaly=True)""",
    "ranks": """Trainer(max_epochs=1, accelerator="cpu", strategy=DDPStrategy(find_unused_parameters=True,
        timeout=timedelta(minutes=5)), check_val_every_n_epoch=2, plugins=[MixedPrecision("16-mixed", "cuda"),
        AsyncCheckpointIO()], gradient_clip_val=0.1, gradient_clip_algorithm="value", deterministic=True)""",
    "looking": """Trainer(fast_dev_run=2, accelerator="cpu", max_time={"minutes": 5}, limit_test_batches=2)""",
    "dry": """Trainer(fast_dev_run=True, accelerator="cpu", strategy="fsdp", devices="1")""",
    "bare": """Trainer(barebones=True, max_steps=3, accelerator="cpu", val_check_interval=2, limit_val_batches=0.5)""",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_runs_as_it_is_printed(name, tmp_path, monkeypatch):
    pytest.importorskip("lightning.pytorch")
    script = tmp_path / "script.py"
    script.write_text(source(inspect.cleandoc(SCRIPTS[name])).replace("'fp16'", "'fp32'"))
    before = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    try:
        space = runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.use_deterministic_algorithms(before[1])
    assert space["fit"].options.accelerator == "cpu"


CONFIG = """
seed_everything: 7
fit:
  trainer:
    max_epochs: 2
    accelerator: cpu
    logger: false
    callbacks:
      - class_path: lightning.pytorch.callbacks.EarlyStopping
        init_args: {monitor: val_loss, patience: 4, strict: true, divergence_threshold: 9.0}
      - class_path: given_parts.Watch
        init_args: {every: 2}
    check_val_every_n_epoch: 1
    min_epochs: null
  model:
    class_path: given_parts.LitLine
    init_args: {lr: 0.2}
  data: {class_path: given_parts.Line}
  optimizer: {class_path: torch.optim.Adam, init_args: {lr: 0.1}}
  ckpt_path: null
"""
PARTS = """
import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

class Watch(pl.Callback):
    seen = 0
    def __init__(self, every):
        self.every = every
    def on_train_batch_end(self, *_):
        Watch.seen += 1

class Line(pl.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.ones(8, 1)), batch_size=4)
    val_dataloader = train_dataloader

class LitLine(pl.LightningModule):
    def __init__(self, lr=1.0):
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).square().mean()
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
"""


def test_the_yaml_of_a_cli_runs_with_its_own_classes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lightning.pytorch")
    (tmp_path / "run.yaml").write_text(CONFIG)
    (tmp_path / "given_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["convert-args", str(tmp_path / "run.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "optimizer: return torch.optim.Adam(self.parameters(), lr=0.1)" in printed
    assert "EarlyStopping(divergence_threshold=)" in printed
    assert "strict" not in printed
    (tmp_path / "script.py").write_text(printed)
    space = runpy.run_path("script.py", run_name="__main__")
    assert space["fit"].options.seed == 7
    assert space["task"].module.hparams.lr == 0.2
    assert sys.modules.pop("given_parts").Watch.seen == 4


def test_a_call_is_pasted_or_read_from_standard_input(monkeypatch, capsys):
    call = "Trainer(max_epochs=5, callbacks=[Mine(3)], devices=args.n, **more)"
    assert main(["convert-args", call]) == 0
    printed = capsys.readouterr().out
    for line in (
        "    epochs=5,",
        "#   devices: args.n is known only when your file runs. Give it here",
        "#   callbacks: Mine: it runs as it is: LightningTask(..., callbacks=[Mine(3)])",
        "#   **more: known only when your file runs",
    ):
        assert line in printed.splitlines()
    monkeypatch.setattr(sys, "stdin", io.StringIO(call))
    assert main(["convert-args", "-"]) == 0
    assert capsys.readouterr().out == printed


def test_the_module_is_made_with_the_package_of_the_file():
    assert source("from pytorch_lightning import Trainer\nTrainer()").startswith(
        "import pytorch_lightning as pl"
    )


def test_what_cannot_be_read_is_said():
    with pytest.raises(OptionError, match=r"no 'max_epoch'\. Did you mean 'max_epochs'"):
        source("Trainer(max_epoch=3)")
    with pytest.raises(OptionError, match="lines 1 and 2"):
        source("a = Trainer()\nb = Trainer()")
    with pytest.raises(OptionError, match="by name"):
        source("Trainer('cpu')")
    with pytest.raises(OptionError, match="no 'trainer'"):
        converted("a: 1", ".yaml")
