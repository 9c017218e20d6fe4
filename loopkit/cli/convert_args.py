"""``loopkit convert-args FILE``: the Fit, the optimizer and the Loader that a Trainer's arguments
stand for.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopkit.cli.convert_loggers import hub_source, logger_sources
from loopkit.cli.convert_strategy import strategy_source
from loopkit.errors import OptionError, nearest
from loopkit.foreign_names import TRAINER_NAMES, Reason

SAME = {
    "output_dir": "run_dir", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size", "gradient_accumulation_steps": "accumulate",
    "max_grad_norm": "clip_norm", "eval_on_start": "eval_first", "full_determinism": "deterministic", "seed": "seed",
    "data_seed": "data_seed", "torch_compile": "compile", "resume_from_checkpoint": "resume",
}  # fmt: skip
LOADER = {
    "dataloader_num_workers": "num_workers", "dataloader_pin_memory": "pin_memory", "dataloader_drop_last": "drop_last",
    "dataloader_prefetch_factor": "prefetch_factor", "dataloader_persistent_workers": "persistent_workers",
    "group_by_length": "group_by_length",
}  # fmt: skip
OPTIMIZERS = {"adafactor": "Adafactor", "sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop"}
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "cosine_with_restarts": "cosine_restarts", "polynomial": "polynomial",
    "constant": "constant", "constant_with_warmup": "constant", "inverse_sqrt": "inverse_sqrt",
    "reduce_lr_on_plateau": "reduce_on_plateau", "cosine_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip
# What Trainer's arguments are when they are not given, where that is not what Fit does.
DEFAULTS = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 8,
    "max_grad_norm": 1.0,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "seed": 42,
}
OFF: tuple[Any, ...] = (None, False, "", "no", 0, [], {})


@dataclass
class Conversion:
    """What a set of Trainer arguments becomes; values are Python source.

    Attributes:
        fit, checkpoint, loader: arguments by name.
        imports: the lines that they need.
        optimizer: the source of what ``Task.optimizers`` returns.
        notes: arguments that have no counterpart, with the reason or what to do instead.
    """

    fit: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, str] = field(default_factory=dict)
    loader: dict[str, str] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)
    optimizer: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    def source(self) -> str:
        """The conversion as Python source, to be pasted."""
        if self.checkpoint:
            self.fit["checkpoint"] = f"Checkpoint({_arguments(self.checkpoint)})"
        strategy = self.fit.get("strategy", "").partition("(")[0]
        lines = [f"from loopkit import {strategy}"] if strategy else []
        lines += self.imports
        lines += [""] if lines else []
        lines += ["fit = Fit(", *(f"    {name}={value}," for name, value in self.fit.items()), ")"]
        lines += ["", "# in the task:", "def optimizers(self):", f"    return {self.optimizer}"]
        if self.loader:
            lines += [
                "",
                "def train_data(self):",
                f"    return Loader(..., {_arguments(self.loader)})",
            ]
        if self.notes:
            lines += [
                "",
                "# not carried over:",
                *(f"#   {name}: {why}" for name, why in self.notes.items()),
            ]
        return "\n".join(lines)


def convert(given: Mapping[str, Any]) -> Conversion:
    """Turn TrainingArguments, by name, into what loopkit calls them.

    Raises:
        OptionError: a name that no version of TrainingArguments has.
    """
    unknown = [
        name
        for name in given
        if name not in TRAINER_NAMES and name not in SAME and name not in ("debug", "warmup_ratio")
    ]
    if unknown:
        hint = nearest(unknown[0], TRAINER_NAMES)
        raise OptionError(f"TrainingArguments has no {unknown[0]!r}.{hint}")
    args = {**DEFAULTS, **given}
    found = Conversion(optimizer=_optimizer(args))
    for name, ours in SAME.items():
        if args.get(name) not in OFF:
            value = args[name]
            found.fit[ours] = repr(
                int(value) if isinstance(value, float) and value == int(value) else value
            )
    if args.get("max_steps", -1) > 0:  # it wins over epochs there
        found.fit["steps"] = repr(args["max_steps"])
        found.fit.pop("epochs", None)
    for name in ("tf32", "fp16", "bf16"):
        if args.get(name):
            found.fit["precision"] = repr(name)
    if args.get("gradient_checkpointing"):
        found.fit["activation_checkpointing"] = "'full'"
    if args.get("disable_tqdm"):
        found.fit["progress"] = "False"
    _cadences(args, found)
    strategy = strategy_source(given)
    if strategy:
        found.fit["strategy"] = strategy
    loggers, found.imports, lost = logger_sources(given)
    if loggers:
        found.fit["loggers"] = loggers
    if lost:
        found.notes["report_to"] = (
            f"there is no logger for {', '.join(lost)}: derive one from Logger"
        )
    if given.get("push_to_hub"):
        found.fit["hooks"] = f"[{hub_source(given)}]"
        found.imports.append("from loopkit.hooks import PushToHub")
    for name, ours in LOADER.items():
        if given.get(name) not in (None, False) and name != "dataloader_pin_memory":
            found.loader[ours] = repr(given[name])
    for name, value in given.items():
        meant = TRAINER_NAMES.get(name)
        if isinstance(meant, Reason) and value not in OFF:
            found.notes[name] = meant
    return found


def _optimizer(args: Mapping[str, Any]) -> str:
    name = str(args.get("optim", "adamw_torch"))
    kind = next((ours for theirs, ours in OPTIMIZERS.items() if name.startswith(theirs)), "AdamW")
    values = {"lr": repr(args["learning_rate"])}
    if args.get("weight_decay"):
        values["weight_decay"] = repr(args["weight_decay"])
    elif kind == "AdamW":
        values["weight_decay"] = "0.0"
    if kind == "AdamW" and ("adam_beta1" in args or "adam_beta2" in args):
        values["betas"] = repr((args.get("adam_beta1", 0.9), args.get("adam_beta2", 0.999)))
    ratio, steps = args.get("warmup_ratio") or 0, args.get("warmup_steps") or 0
    if 0 < steps < 1:
        ratio, steps = steps, 0
    warmup = repr(int(steps)) if steps else f"'{ratio * 100:g}%'" if ratio else ""
    schedule = SCHEDULES[str(args["lr_scheduler_type"]).removeprefix("SchedulerType.").lower()]
    values["schedule"] = f"{schedule}({f'warmup={warmup}' if warmup else ''})"
    return f"{kind}({_arguments(values)})"


def _cadences(args: Mapping[str, Any], found: Conversion) -> None:
    log = _every(args.get("logging_strategy", "steps"), args.get("logging_steps", 500))
    found.fit["log_every"] = log
    evaluation = args.get("eval_strategy") or args.get("evaluation_strategy") or "no"
    found.fit["eval_every"] = _every(
        evaluation, args.get("eval_steps") or args.get("logging_steps", 500)
    )
    if args.get("eval_delay"):
        delay = args["eval_delay"]
        found.fit["eval_after"] = repr(
            f"{delay:g} {'epochs' if '1 epoch' in found.fit['eval_every'] else 'steps'}"
        )
    strategy = args.get("save_strategy", "steps")
    if str(strategy).lower().endswith("no"):
        found.fit["checkpoint"] = "False"
        return
    found.checkpoint["every"] = _every(strategy, args.get("save_steps", 500))
    found.checkpoint["keep"] = repr(args.get("save_total_limit"))
    if args.get("save_only_model"):
        found.checkpoint["weights_only"] = "True"
    metric = args.get("metric_for_best_model") or (
        "loss" if args.get("load_best_model_at_end") else None
    )
    if metric:
        metric = str(metric).removeprefix("eval_")
        larger = args.get("greater_is_better")
        larger = not metric.endswith("loss") if larger is None else larger
        found.checkpoint["best"] = repr(f"eval/{metric}:{'max' if larger else 'min'}")
        if args.get("load_best_model_at_end"):
            found.checkpoint["load_best"] = "True"


def _every(strategy: Any, steps: Any) -> str:
    kind = str(strategy).lower().rpartition(".")[2]
    if kind == "no":
        return "'never'"
    if kind in ("epoch", "best"):
        return "'1 epoch'"
    return f"'{steps * 100:g}%'" if 0 < float(steps) < 1 else f"'{int(steps)} steps'"


def _arguments(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def read_arguments(path: Path) -> dict[str, Any]:
    """The arguments in a JSON file, or in the first ``TrainingArguments(...)`` or dict of a Python
    file.

    Nothing of the file is run: only literal values are taken.

    Raises:
        OptionError: the file cannot be read, or holds no such thing.
    """
    try:
        text = path.read_text()
        if path.suffix != ".py":
            found = json.loads(text)
            if isinstance(found, dict):
                return found
            raise ValueError("it holds no object")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("TrainingArguments"):
                return {
                    k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg is not None
                }
            if isinstance(node, ast.Dict) and node.keys:
                return dict(ast.literal_eval(node))
        raise ValueError("it holds no TrainingArguments(...) and no dict")
    except (OSError, ValueError, SyntaxError) as error:
        raise OptionError(f"convert-args cannot read {path}: {error}") from error


def run(words: list[str]) -> int:
    """``loopkit convert-args FILE``; returns the exit code."""
    if len(words) != 1 or words[0].startswith("-"):
        print(
            "usage: loopkit convert-args FILE.json|FILE.py\n\nprints the Fit for the Trainer's "
            "arguments in a file",
            file=sys.stdout if words in (["--help"], ["-h"]) else sys.stderr,
        )
        return 0 if words in (["--help"], ["-h"]) else 2
    print(convert(read_arguments(Path(words[0]))).source())
    return 0
