"""Tries every option under every strategy, and writes docs/support.md: ``python -m tests.docs.support_table``.

A cell says "yes" if two steps train on two ranks, and "no" if loopkit refuses before the first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from loopkit import Compile, StepLoop, hooks, optim
from loopkit.errors import LoopkitError, LoopkitWarning
from loopkit.strategies.precision import PRECISIONS
from tests.contract import jobs
from tests.contract.tasks import TokenClassifier
from tests.docs.pages import DOCS
from tests.ranks import Ranks
from tests.support import quiet

PAGE = DOCS / "support.md"
STRATEGIES = {
    "one device": "single", "DDP": "ddp", "FSDP": "fsdp", "TensorParallel": "tensor",
    "DeepSpeed 1, 2": "zero2", "DeepSpeed 3": "zero3",
}  # fmt: skip


class Words(TokenClassifier):
    """Token classification with any optimizer.

    Args:
        choice: returns what ``optimizers`` returns; None keeps AdamW.
    """

    def __init__(self, choice: Callable[[Any], Any] | None = None) -> None:
        super().__init__(count=32)
        self.choice = choice

    def optimizers(self) -> Any:
        return self.choice(self) if self.choice else super().optimizers()


class Plain(StepLoop):
    """A step of one's own that does what the default step does."""

    def run(self, run: Any, batches: Any) -> Any:
        out = self.backward(run, batches)
        self.update(run)
        return out


def two(task: Any) -> dict[str, Any]:
    """Return two optimizers, which share the layers of the task."""
    return {
        "body": optim.AdamW(lr=1e-2, params="embed|blocks"),
        "head": optim.AdamW(lr=1e-2, params="head"),
    }


# What is tried: options of Fit, and the optimizers of the task.
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "`clip_norm=1.0`": lambda: {"clip_norm": 1.0},
    "`clip_value=0.5`": lambda: {"clip_value": 0.5},
    "`accumulate=2`": lambda: {"accumulate": 2},
    '`micro_batch="auto"`': lambda: {"micro_batch": "auto"},
    "`compile=True`": lambda: {"compile": Compile(backend="eager")},
    '`activation_checkpointing="full"`': lambda: {"activation_checkpointing": "full"},
    '`rng="stream"`': lambda: {"rng": "stream"},
    '`on_nan="skip"`': lambda: {"on_nan": "skip"},
    '`debug="numerics"`': lambda: {"debug": "numerics"},
    "a step of your own": lambda: {"step": Plain()},
    "`GradMonitor`, `on_before_update`": lambda: {"hooks": [hooks.GradMonitor()]},
    "`EMA`": lambda: {"hooks": [hooks.EMA()]},
    "`SWA`": lambda: {"hooks": [hooks.SWA(start="50%")]},
    "`FindLR`": lambda: {"hooks": [hooks.FindLR(steps=10)]},
    "`Unfreeze`": lambda: {"hooks": [hooks.Unfreeze({"1 steps": "embed"})]},
}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "several optimizers": two,
    "`Adafactor`": lambda task: optim.Adafactor(lr=1e-2),
    "`Muon`": lambda task: optim.Muon(lr=1e-2),
    "`Lion`": lambda task: optim.Lion(lr=1e-3),
    "torch's own objects": lambda task: torch.optim.AdamW(task.parameters(), lr=1e-2),
}
OTHERS = ("`fit.prepare(task)`", "`LightningTask`")
ROWS = [*(f'`"{name}"`' for name in PRECISIONS), *OPTIONS, *OPTIMIZERS, *OTHERS]


def tried(strategy: str, row: str) -> str:
    """Return "" if two steps train, else the message that refuses; every rank calls this."""
    options = {"precision": row.strip('`"')} if row.strip('`"') in PRECISIONS else {}
    if row == '`"fp16-true"`':
        options["on_nan"] = "skip"  # two steps without a scaler may overflow
    if row in OPTIONS:
        options = OPTIONS[row]()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LoopkitWarning)
            made = jobs.make(strategy)
            if row == "`fit.prepare(task)`":
                by_hand(quiet(strategy=made, epochs=1, batch_size=8))
                return ""
            task = lightning_task() if row == "`LightningTask`" else Words(OPTIMIZERS.get(row))
            quiet(strategy=made, steps=2, batch_size=8, eval_every="never", **options).run(task)
    except LoopkitError as error:
        return str(error)
    return ""


def by_hand(fit: Any) -> None:
    """Train one epoch by a loop written by hand."""
    with fit.prepare(Words()) as prepared:
        for batch in prepared.batches():
            prepared.backward(prepared.forward(batch))
            prepared.step()


def lightning_task() -> Any:
    """Return a small LightningModule as a task."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from loopkit.interop import LightningTask

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.words = Words()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.words.train_step(batch)["loss"]

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def train_dataloader(self) -> Any:
            return DataLoader(self.words.train_data(), batch_size=8)

    return LightningTask(Module())


def cells(pair: Ranks, row: str) -> dict[str, str]:
    """Return by strategy what refuses a row; "" where it trains."""
    return {
        name: tried("single", row) if kind == "single" else pair.call(tried, kind, row)[0]
        for name, kind in STRATEGIES.items()
    }


def tables(found: dict[str, dict[str, str]]) -> str:
    """Return the tables as Markdown, and the reason of each "no" below them."""
    reasons: list[str] = []

    def cell(message: str) -> str:
        if not message:
            return "yes"
        if message not in reasons:
            reasons.append(message)
        return f"no ({1 + reasons.index(message)})"

    text = ""
    for title, names in (
        ("precision", [row for row in ROWS if row.strip('`"') in PRECISIONS]),
        ("option or hook", list(OPTIONS)),
        ("optimizers", list(OPTIMIZERS)),
        ("task or loop", list(OTHERS)),
    ):
        text += f"\n| {title} | {' | '.join(STRATEGIES)} |\n|---|{'---|' * len(STRATEGIES)}\n"
        for row in names:
            text += f"| {row} | {' | '.join(map(cell, found[row].values()))} |\n"
    listed = "\n".join(f"{number}. `{reason}`" for number, reason in enumerate(reasons, 1))
    return f'{text.lstrip()}\nA "no" is an error before the first step, with this message:\n\n{listed}\n'


BEGIN, END = "<!-- support -->\n", "<!-- end -->"


def written(page: str, text: str) -> str:
    """Return the page with new tables between its markers."""
    head, _, rest = page.partition(BEGIN)
    return head + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2]


def main() -> None:
    """Try everything and write the page."""
    torch.set_num_threads(1)
    pair = Ranks(2)
    found = {row: cells(pair, row) for row in ROWS}
    pair.close()
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), tables(found)), encoding="utf-8")


if __name__ == "__main__":
    # The ranks look the functions up by the name of this module.
    from tests.docs import support_table

    support_table.main()
