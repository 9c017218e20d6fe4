"""The script that ``loopkit convert-args`` prints for Lightning's arguments: it runs as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from loopkit.cli.lightning_args.call_arguments import WrittenCall

_STRATEGIES = ("DDP", "FSDP")
_MODULE = """\
# This small module lets the script run. Put yours here.
class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.layer(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.layer(batch[0]), batch[1])
{logged}

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self):
        x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=16, shuffle=True)

    def val_dataloader(self):
        return self.train_dataloader()"""


@dataclass
class Script:
    """What becomes of the arguments of a Trainer, as Python source.

    Attributes:
        package: where LightningModule comes from.
        model: the class of the module; None for a small one.
        data: the class of the data module; None without one.
        fit, checkpoint: the sources of arguments by name.
        hooks: the sources of hooks.
        callbacks: callbacks that stay Lightning's.
        imports: import lines of loggers.
        before: statements before all others.
        monitored: logged names that a hook or a checkpoint watches.
        synchronised: whether batch normalisation is synchronised over the ranks.
        saves: whether checkpoints are saved.
        notes: what is not carried over, each with the reason or what to do.
    """

    package: str = "lightning.pytorch"
    model: WrittenCall | None = None
    data: WrittenCall | None = None
    fit: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, str] = field(default_factory=dict)
    hooks: list[str] = field(default_factory=list)
    callbacks: list[WrittenCall] = field(default_factory=list)
    imports: set[str] = field(default_factory=set)
    before: list[str] = field(default_factory=list)
    monitored: list[str] = field(default_factory=list)
    synchronised: bool = False
    saves: bool = True
    notes: dict[str, str] = field(default_factory=dict)

    def hook(self, source: str) -> None:
        """Add a hook, once for each class."""
        if source.partition("(")[0] not in [each.partition("(")[0] for each in self.hooks]:
            self.hooks.append(source)

    def source(self) -> str:
        """Return the script."""
        options = dict(self.fit)
        if not self.saves:
            options["checkpoint"] = "False"
        elif self.checkpoint:
            shown = ", ".join(f"{name}={value}" for name, value in self.checkpoint.items())
            options["checkpoint"] = f"Checkpoint({shown})"
        if self.hooks:
            options["hooks"] = f"[{', '.join(self.hooks)}]"
        parts = ["\n".join(self._imports(options)), *self.before, *self._module(), self._task()]
        parts.append("\n".join(["fit = Fit(", *(f"    {n}={v}," for n, v in options.items()), ")"]))
        parts.append('if __name__ == "__main__":\n    print(fit.run(task).summary())')
        if self.notes:
            notes = [f"#   {name}: {reason}" for name, reason in self.notes.items()]
            parts.append("\n".join(["# not carried over:", *notes]))
        return "\n\n".join(parts)

    def _imports(self, options: dict[str, str]) -> Iterator[str]:
        own = self.model is None
        if own:
            yield f"import {self.package} as pl"
        if own or self.before or self.synchronised:
            yield "import torch"
        if own or self.synchronised:
            yield "from torch import nn"
        if own:
            yield "from torch.nn import functional as F\nfrom torch.utils.data import DataLoader, TensorDataset"
        for call in (self.model, self.data, *self.callbacks):
            if call is not None:
                yield f"from {call.module} import {call.name}"
        strategy = options.get("strategy", "").partition("(")[0]
        names = ["Fit"] + ["Checkpoint"] * options.get("checkpoint", "").startswith("Checkpoint")
        names += [strategy] * (strategy in _STRATEGIES)
        yield f"\nfrom loopkit import {', '.join(sorted(names))}"
        hooks = sorted(re.findall(r"^\w+", "\n".join(self.hooks), re.MULTILINE))
        lines = [*self.imports, "from loopkit.interop import LightningTask"]
        yield from sorted(lines + [f"from loopkit.hooks import {', '.join(hooks)}"] * bool(hooks))

    def _module(self) -> Iterator[str]:
        if self.model is None:
            logged = {
                name: "loss" for name in ["val_loss", *self.monitored] if name != "train_loss"
            }
            yield _MODULE.format(
                logged="\n".join(
                    f"        self.log({name!r}, {value})" for name, value in logged.items()
                )
            )

    def _task(self) -> str:
        module = "Module()" if self.model is None else _called(self.model)
        if self.synchronised:
            module = f"nn.SyncBatchNorm.convert_sync_batchnorm({module})"
        parts = [module]
        if self.data is not None:
            parts.append(_called(self.data))
        if self.callbacks:
            parts.append(f"callbacks=[{', '.join(map(_called, self.callbacks))}]")
        return f"task = LightningTask({', '.join(parts)})"


def _called(call: WrittenCall) -> str:
    return (
        f"{call.name}({', '.join(f'{name}={_shown(value)}' for name, value in call.named.items())})"
    )


def _shown(value: object) -> str:
    return _called(value) if isinstance(value, WrittenCall) else repr(value)
