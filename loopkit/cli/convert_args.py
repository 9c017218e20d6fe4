"""``loopkit convert-args FILE``: turn a Trainer's arguments into a Fit, an optimizer, a Loader."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopkit.cli.args.command_parser import CommandParser
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
# The defaults of the Trainer that differ from those of Fit.
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
    """A set of Trainer arguments as Python source.

    Attributes:
        fit, checkpoint, loader: the sources of arguments by name.
        imports: the import lines that they need.
        optimizer: the source of the expression that ``Task.optimizers`` returns.
        notes: arguments without a counterpart, each with the reason or with what to do instead.
    """

    fit: dict[str, str] = field(default_factory=dict)
    checkpoint: dict[str, str] = field(default_factory=dict)
    loader: dict[str, str] = field(default_factory=dict)
    imports: list[str] = field(default_factory=list)
    optimizer: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    def source(self) -> str:
        """Return the conversion as Python source to paste."""
        options = dict(self.fit)
        if self.checkpoint:
            options["checkpoint"] = f"Checkpoint({_arguments(self.checkpoint)})"
        strategy = options.get("strategy", "").partition("(")[0]
        objects = {"Checkpoint": self.checkpoint, "Loader": self.loader, strategy: strategy}
        names = sorted(["Fit", *(name for name, used in objects.items() if used)])
        spec = sorted(re.findall(r"(\w+)\(", self.optimizer))
        lines = [f"from loopkit import {', '.join(names)}", *self.imports]
        lines += [f"from loopkit.optim import {', '.join(spec)}", ""]
        lines += ["fit = Fit(", *(f"    {name}={value}," for name, value in options.items()), ")"]
        lines += ["", "# in the task:", "def optimizers(self):", f"    return {self.optimizer}"]
        if self.loader:
            loader = f"Loader(..., {_arguments(self.loader)})"
            lines += ["", "def train_data(self):", f"    return {loader}"]
        if self.notes:
            notes = [f"#   {name}: {reason}" for name, reason in self.notes.items()]
            lines += ["", "# not carried over:", *notes]
        return "\n".join(lines)


def convert(given: Mapping[str, Any]) -> Conversion:
    """Convert TrainingArguments, given by name.

    Raises:
        OptionError: no version of TrainingArguments has one of the names.
    """
    _check_names(given)
    args = {**DEFAULTS, **given}
    found = Conversion(optimizer=_optimizer(args))
    for name, ours in SAME.items():
        value = args.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value not in OFF:
            found.fit[ours] = repr(value)
    if args.get("max_steps", -1) > 0:  # the Trainer then ignores the epochs
        found.fit["steps"] = repr(args["max_steps"])
        found.fit.pop("epochs", None)
    for name in ("tf32", "fp16", "bf16"):
        if args.get(name):
            found.fit["precision"] = repr(name)
    if args.get("gradient_checkpointing"):
        found.fit["activation_checkpointing"] = "'full'"
    if args.get("disable_tqdm"):
        found.fit["progress"] = "False"
    _convert_cadences(args, found)
    _convert_objects(given, found)
    for name, ours in LOADER.items():
        if given.get(name) not in (None, False) and name != "dataloader_pin_memory":
            found.loader[ours] = repr(given[name])
    for name, value in given.items():
        meant = TRAINER_NAMES.get(name)
        if isinstance(meant, Reason) and value not in OFF:
            found.notes[name] = meant
    return found


def _check_names(given: Mapping[str, Any]) -> None:
    known = [*TRAINER_NAMES, *SAME, "debug", "warmup_ratio"]
    for name in given:
        if name not in known:
            raise OptionError(f"TrainingArguments has no {name!r}.{nearest(name, known)}")


def _convert_objects(given: Mapping[str, Any], found: Conversion) -> None:
    strategy = strategy_source(given)
    if strategy:
        found.fit["strategy"] = strategy
    loggers, found.imports, missing = logger_sources(given)
    if loggers:
        found.fit["loggers"] = loggers
    if missing:
        names = ", ".join(missing)
        found.notes["report_to"] = f"there is no logger for {names}: derive one from Logger"
    if given.get("push_to_hub"):
        found.fit["hooks"] = f"[{hub_source(given)}]"
        found.imports.append("from loopkit.hooks import PushToHub")


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
    values["schedule"] = _schedule(args)
    return f"{kind}({_arguments(values)})"


def _schedule(args: Mapping[str, Any]) -> str:
    ratio = args.get("warmup_ratio") or 0
    steps = args.get("warmup_steps") or 0
    if 0 < steps < 1:  # newer versions take a ratio here too
        ratio = steps
    warmup = ""
    if steps >= 1:
        warmup = f"warmup={int(steps)}"
    elif ratio:
        warmup = f"warmup='{ratio * 100:g}%'"
    name = str(args["lr_scheduler_type"]).removeprefix("SchedulerType.").lower()
    return f"{SCHEDULES[name]}({warmup})"


def _convert_cadences(args: Mapping[str, Any], found: Conversion) -> None:
    log_steps = args.get("logging_steps", 500)
    found.fit["log_every"] = _every(args.get("logging_strategy", "steps"), log_steps)
    strategy = args.get("eval_strategy") or args.get("evaluation_strategy") or "no"
    found.fit["eval_every"] = _every(strategy, args.get("eval_steps") or log_steps)
    if args.get("eval_delay"):
        unit = "epochs" if "1 epoch" in found.fit["eval_every"] else "steps"
        found.fit["eval_after"] = repr(f"{args['eval_delay']:g} {unit}")
    strategy = args.get("save_strategy", "steps")
    if str(strategy).lower().endswith("no"):
        found.fit["checkpoint"] = "False"
        return
    found.checkpoint["every"] = _every(strategy, args.get("save_steps", 500))
    found.checkpoint["keep"] = repr(args.get("save_total_limit"))
    if args.get("save_only_model"):
        found.checkpoint["weights_only"] = "True"
    load_best = args.get("load_best_model_at_end")
    metric = args.get("metric_for_best_model") or ("loss" if load_best else None)
    if metric:
        metric = str(metric).removeprefix("eval_")
        greater = args.get("greater_is_better")
        greater = not metric.endswith("loss") if greater is None else greater
        found.checkpoint["best"] = repr(f"eval/{metric}:{'max' if greater else 'min'}")
        if load_best:
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
    """Read the arguments in a file, without running it: only literal values are taken.

    Args:
        path: JSON, or a Python file with ``TrainingArguments(...)`` or a dict.

    Raises:
        OptionError: the file cannot be read, or holds no arguments.
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
                named = [keyword for keyword in node.keywords if keyword.arg is not None]
                return {str(each.arg): ast.literal_eval(each.value) for each in named}
            if isinstance(node, ast.Dict) and node.keys:
                return dict(ast.literal_eval(node))
        raise ValueError("it holds no TrainingArguments(...) and no dict")
    except (OSError, ValueError, SyntaxError) as error:
        raise OptionError(f"convert-args cannot read {path}: {error}") from error


def run(argv: Sequence[str]) -> int:
    """Print the conversion of a file; return the exit code."""
    parser = CommandParser(
        "convert-args", "Print the Fit for the arguments of a Hugging Face Trainer."
    )
    parser.add_argument(
        "file", type=Path, help="JSON, or a Python file with TrainingArguments(...) or a dict"
    )
    print(convert(read_arguments(parser.parse_args(argv).file)).source())
    return 0
