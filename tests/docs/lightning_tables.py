"""Writes the tables of docs/from-lightning.md: ``python -m tests.docs.lightning_tables``.

Each row shows what ``loopkit convert-args`` makes of an argument, so the page says what the code
does.
"""

from __future__ import annotations

import ast
import re

from loopkit.cli.lightning_args.callbacks import known_callbacks
from loopkit.cli.lightning_args.convert import convert_lightning
from loopkit.cli.lightning_args.lightning_script import Script
from loopkit.cli.lightning_args.signatures import SIGNATURES
from loopkit.cli.lightning_args.trainer_source import read_python
from loopkit.foreign_values import ATTRIBUTES, EVENTS
from loopkit.interop.lightning.left_out import CALLBACKS
from tests.docs.pages import DOCS

PAGE = DOCS / "from-lightning.md"
# Values of each argument of the Trainer that are shown, as source.
SAMPLES: dict[str, tuple[str, ...]] = {
    "accelerator": ('"gpu"', '"cpu"', '"tpu"'),
    "strategy": (
        '"ddp"', '"ddp_find_unused_parameters_true"', '"ddp_notebook"', '"fsdp"',
        "DDPStrategy(static_graph=True)", "FSDPStrategy(cpu_offload=True)", '"deepspeed"',
        '"model_parallel"',
    ),
    "devices": ("2", "-1", "[0, 1]"),
    "num_nodes": ("2",),
    "precision": ('"bf16-mixed"', '"16-mixed"', '"bf16-true"', '"64-true"', '"transformer-engine"'),
    "logger": ("False", 'WandbLogger(project="digits")', 'CSVLogger("logs")'),
    "callbacks": ('[EarlyStopping("val_loss", patience=5)]', '[ModelCheckpoint(monitor="val_loss")]'),
    "fast_dev_run": ("True", "3"),
    "max_epochs": ("10", "-1"),
    "min_epochs": ("2",),
    "max_steps": ("1000",),
    "min_steps": ("100",),
    "max_time": ('"00:12:00:00"',),
    "limit_train_batches": ("0.1", "20"),
    "limit_val_batches": ("0.5", "0"),
    "limit_test_batches": ("10",),
    "limit_predict_batches": ("10",),
    "overfit_batches": ("4", "0.01"),
    "val_check_interval": ("0.25", "500"),
    "check_val_every_n_epoch": ("2",),
    "num_sanity_val_steps": ("2", "-1"),
    "log_every_n_steps": ("10",),
    "enable_checkpointing": ("False",),
    "enable_progress_bar": ("False",),
    "enable_model_summary": ("True",),
    "accumulate_grad_batches": ("4",),
    "gradient_clip_val": ("1.0",),
    "gradient_clip_algorithm": ('"value", gradient_clip_val=0.5',),
    "deterministic": ("True", '"warn"'),
    "benchmark": ("True",),
    "inference_mode": ("False",),
    "use_distributed_sampler": ("False",),
    "profiler": ('"pytorch"', '"simple"'),
    "detect_anomaly": ("True",),
    "barebones": ("True",),
    "plugins": ('[MixedPrecision("16-mixed", "cuda")]',),
    "sync_batchnorm": ("True",),
    "reload_dataloaders_every_n_epochs": ("1",),
    "default_root_dir": ('"logs"',),
    "enable_autolog_hparams": ("False",),
    "model_registry": ('"name"',),
}  # fmt: skip
# What a reader wants to know beside the conversion.
_REMARKS = {
    "accumulate_grad_batches": ", or `global_batch_size=256`, which fits any number of devices",
    "detect_anomaly": ", which names the layer; `on_nan=\"raise\"`, the default, stops before an update",
    "fast_dev_run": ", which also resumes, and leaves nothing behind",
    "plugins": "; a strategy of your own is an object for `strategy`",
    "profiler": "; `result.timings` has the time of a step by part",
}  # fmt: skip
# Calls of callbacks that are shown.
_CALLBACKS = {
    "ModelCheckpoint": 'monitor="val_acc", mode="max", save_top_k=3',
    "EarlyStopping": '"val_loss", patience=5',
    "StochasticWeightAveraging": "1e-3, swa_epoch_start=0.8",
    "EMAWeightAveraging": "decay=0.999",
    "ModelSummary": "max_depth=2",
    "RichModelSummary": "max_depth=2",
    "Timer": 'duration="00:02:00:00"',
}


def converted(call: str, around: str = "") -> str:
    """Return what becomes of a call of the Trainer, beside what a call without arguments gives."""
    plain = convert_lightning(read_python(ast.parse("Trainer()")))
    return _difference(plain, convert_lightning(read_python(ast.parse(f"t = {call}\n{around}"))))


def _difference(plain: Script, found: Script) -> str:
    options = {name: value for name, value in found.fit.items() if plain.fit.get(name) != value}
    if "epochs" in plain.fit and {"steps", "time"} & options.keys():
        options.pop("epochs", None)
    settings = {n: v for n, v in found.checkpoint.items() if plain.checkpoint.get(n) != v}
    if settings:
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        options["checkpoint"] = f"Checkpoint({shown})"
    if not found.saves:
        options["checkpoint"] = "False"
    if found.hooks:
        options["hooks"] = f"[{', '.join(found.hooks)}]"
    parts = [f"`{name}={value}`" for name, value in options.items()]
    parts += [f"`{line}`" for line in found.before]
    if found.synchronised:
        parts.append("`LightningTask(nn.SyncBatchNorm.convert_sync_batchnorm(module))`")
    parts += [reason for name, reason in found.notes.items() if name not in plain.notes]
    return _marked("; ".join(parts)) or "the same by default"


# Calls, dotted names, settings and names with an underscore.
_CODE = re.compile(
    r"`[^`]*`|[\w.]+\((?:[^()]|\([^()]*\))*\)|[A-Z_]+=[\d,]+|\w+=(?:'[^']*'|\"[^\"]*\"|[\w.]+\((?:[^()]|\([^()]*\))*\)|\[.*?\](?=[\s,;]|$)|\w+)|[a-z]\w*\.[\w.]*\w|\w+_\w+"
)


def _marked(text: str) -> str:
    """Return text with its code in backticks, quoted as Python's formatter does."""

    def code(found: re.Match[str]) -> str:
        return "`" + found[0].strip("`").replace("'", '"') + "`"

    return _CODE.sub(code, text.replace("|", "\\|"))


def trainer() -> str:
    """Return a row for each shown value of each argument of the Trainer."""
    rows = []
    for name in SIGNATURES["Trainer"]:
        for number, value in enumerate(SAMPLES[name]):
            remark = _REMARKS.get(name, "") if number == 0 else ""
            rows.append(f"| `{name}={value}` | {converted(f'Trainer({name}={value})')}{remark} |")
    resumed = converted("Trainer()", 't.fit(module, ckpt_path="last")')
    rows.append(f'| `ckpt_path="last"` of `fit` | {resumed} |')
    return "\n".join(["| `Trainer(...)` | `Fit(...)` |", "|---|---|", *rows]) + "\n"


def callbacks() -> str:
    """Return a row for each callback of Lightning that works inside its loops."""
    rows = []
    for name in sorted(known_callbacks(), key=str.lower):
        if name in SIGNATURES:
            call = f"{name}({_CALLBACKS.get(name, '')})"
            ours = converted(f"Trainer(callbacks=[{call}])")
        else:
            call, ours = name, _marked(CALLBACKS[name].removeprefix("pass "))
        rows.append(f"| `{call}` | {ours} |")
    return "\n".join(["| Lightning's callback | here |", "|---|---|", *rows]) + "\n"


def events() -> str:
    """Return a row for each hook of Lightning that has another name here."""
    import lightning.pytorch as pl

    theirs = {*dir(pl.Callback), *dir(pl.LightningModule)}
    grouped: dict[str, list[str]] = {}
    for name, ours in EVENTS.items():
        if name in theirs and name.startswith("on_"):
            grouped.setdefault(ours, []).append(f"`{name}`")
    rows = [
        f"| {', '.join(names)} | {_marked(ours) if ' ' in ours else f'`{ours}`'} |"
        for ours, names in grouped.items()
    ]
    return "\n".join(["| Lightning's hook | event here |", "|---|---|", *rows]) + "\n"


def attributes() -> str:
    """Return a row for each attribute of a LightningModule that a task does not have."""
    import lightning.pytorch as pl

    rows = [
        f"| `self.{name}` | {_marked(ours)} |"
        for name, ours in ATTRIBUTES.items()
        if hasattr(pl.LightningModule, name)
    ]
    return "\n".join(["| in a LightningModule | in a Task |", "|---|---|", *rows]) + "\n"


def written(page: str) -> str:
    """Return the page with new tables between its markers."""
    for name in ("trainer", "callbacks", "events", "attributes"):
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        head, found, rest = page.partition(begin)
        assert found, f"{PAGE.name} has no {begin.strip()}"
        page = head + begin + "\n" + globals()[name]() + "\n" + end + rest.partition(end)[2]
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
