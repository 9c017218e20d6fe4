"""The script that ``loopkit convert-args`` prints: it runs as it is, on a small model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

_STRATEGIES = ("DDP", "DeepSpeed", "FSDP")
_CLASSIFIER = """\
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
)
train_data = [{"input_ids": [1, 2, 3 + n % 7], "labels": n % 2} for n in range(64)]"""
_SEQ2SEQ = """\
model = T5ForConditionalGeneration(
    T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
)
train_data = [{"input_ids": [1, 2, 3 + n % 7], "labels": [3 + n % 7, 1]} for n in range(64)]"""
_METRIC = """\
def compute_metrics(outputs):
    # Compute {name} of outputs.preds and outputs.target here. 0.0 lets the script run.
    return {{{name!r}: 0.0}}"""
_SMOOTHED = """\
def smoothed(outputs, batch):
    # Of a causal model compare logits[:, :-1] with labels[:, 1:].
    logits, labels = outputs["logits"], batch["labels"]
    return F.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), label_smoothing={smoothing}
    )"""


@dataclass
class Conversion:
    """A set of Trainer arguments as Python source.

    Attributes:
        fit, checkpoint, loader, task: the sources of arguments by name; ``task`` are HFTask's.
        imports: the import lines that they need.
        optimizer: the source of the optimizer.
        metric: the metric that the best checkpoint is chosen by; "" for none.
        smoothing: the label smoothing; 0 for the model's own loss.
        notes: arguments that are not carried over, each with the reason or what to do instead.
    """

    fit: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, str] = field(default_factory=dict)
    loader: dict[str, str] = field(default_factory=dict)
    task: dict[str, str] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)
    optimizer: str = ""
    metric: str = ""
    smoothing: float = 0.0
    notes: dict[str, str] = field(default_factory=dict)

    def source(self) -> str:
        """Return the conversion as a script that runs."""
        options = dict(self.fit)
        if self.checkpoint:
            options["checkpoint"] = f"Checkpoint({_arguments(self.checkpoint)})"
        parts = [
            "\n".join(self._imports(options)),
            "# This small model and data let the script run. Put yours here.\n"
            + (_SEQ2SEQ if self._generates else _CLASSIFIER)
            + "\neval_data = train_data[:16]",
            *self._functions(),
            "\n".join(["task = HFTask(", *self._task(), ")"]),
            "\n".join(["fit = Fit(", *(f"    {n}={v}," for n, v in options.items()), ")"]),
            'if __name__ == "__main__":\n    print(fit.run(task).summary())',
        ]
        if self.notes:
            notes = [f"#   {name}: {reason}" for name, reason in self.notes.items()]
            parts.append("\n".join(["# not carried over:", *notes]))
        return "\n\n".join(parts)

    @property
    def _generates(self) -> bool:
        return "generate" in self.task

    def _imports(self, options: Mapping[str, str]) -> Iterator[str]:
        if self.smoothing:
            yield "from torch.nn import functional as F"
        kinds = ("T5Config", "T5ForConditionalGeneration")
        if not self._generates:
            kinds = ("BertConfig", "BertForSequenceClassification")
        yield f"from transformers import {', '.join(kinds)}\n"
        strategy = options.get("strategy", "").partition("(")[0]
        names = {
            "Fit": True,
            "Checkpoint": bool(self.checkpoint),
            "Compile": "(" in options.get("compile", ""),
            "Loader": bool(self.loader),
            strategy: strategy in _STRATEGIES,
        }
        yield f"from loopkit import {', '.join(sorted(name for name in names if names[name]))}"
        yield from sorted(
            [
                *self.imports,
                "from loopkit.interop import HFTask",
                f"from loopkit.optim import {', '.join(sorted(_called(self.optimizer)))}",
            ]
        )

    def _functions(self) -> Iterator[str]:
        if self.metric and self.metric != "loss":
            yield _METRIC.format(name=self.metric)
        if self.smoothing:
            yield _SMOOTHED.format(smoothing=self.smoothing)

    def _task(self) -> Iterator[str]:
        yield "    model,"
        loader = f"Loader(train_data, {_arguments(self.loader)})" if self.loader else "train_data"
        yield f"    {loader},"
        yield "    eval_data,"
        settings = dict(self.task)
        if self.metric and self.metric != "loss":
            settings["compute_metrics"] = "compute_metrics"
        if self.smoothing:
            settings["loss_fn"] = "smoothed"
        settings["optimizers"] = self.optimizer
        yield from (f"    {name}={value}," for name, value in settings.items())


def _called(source: str) -> set[str]:
    """Return the names of the functions that an expression calls."""
    return set(re.findall(r"(\w+)\(", source))


def _arguments(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())
