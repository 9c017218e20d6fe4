"""``loopkit convert-args FILE``: turn a Trainer's arguments into a script that trains."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loopkit.cli.args.command_parser import CommandParser
from loopkit.cli.convert_cadences import convert_cadences
from loopkit.cli.convert_loggers import hub_source, logger_sources
from loopkit.cli.convert_optim import optimizer_source
from loopkit.cli.convert_script import Conversion
from loopkit.cli.convert_strategy import strategy_source
from loopkit.cli.lightning_args.convert import convert_lightning
from loopkit.cli.lightning_args.lightning_script import Script
from loopkit.cli.lightning_args.trainer_source import holds_trainer, read_python, read_yaml
from loopkit.cli.trainer_arguments import OFF, TrainerArguments
from loopkit.errors import OptionError, nearest
from loopkit.foreign_names import TRAINER_NAMES, Reason

SAME = {
    "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size", "gradient_accumulation_steps": "accumulate",
    "max_grad_norm": "clip_norm", "eval_on_start": "eval_first", "full_determinism": "deterministic",
    "seed": "seed", "data_seed": "data_seed",
}  # fmt: skip
LOADER = {
    "dataloader_num_workers": "num_workers", "dataloader_drop_last": "drop_last",
    "dataloader_prefetch_factor": "prefetch_factor", "dataloader_persistent_workers": "persistent_workers",
    "dataloader_multiprocessing_context": "multiprocessing_context",
}  # fmt: skip
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
_GENERATION = {"generation_max_length": "max_length", "generation_num_beams": "num_beams"}


def convert(given: Mapping[str, Any]) -> Conversion:
    """Convert TrainingArguments, or Seq2SeqTrainingArguments, given by name.

    Raises:
        OptionError: no version of TrainingArguments has one of the names.
    """
    _check_names(given)
    args, found = TrainerArguments(given), Conversion()
    if "output_dir" in given:
        found.fit["run_dir"] = repr(str(args["output_dir"]))
    _convert_length(args, found)
    _convert_numbers(args, found)
    convert_cadences(args, found)
    _convert_data(args, found)
    _convert_task(args, found)
    _convert_objects(args, found)
    found.optimizer = optimizer_source(args, found.notes)
    for name in args.unused():
        meant = TRAINER_NAMES.get(name, "")
        reason = meant if isinstance(meant, Reason) else f"here that is {meant}"
        found.notes.setdefault(name, reason)
    return found


def _check_names(given: Mapping[str, Any]) -> None:
    known = [*TRAINER_NAMES, *SAME, "debug", "activation_checkpointing"]
    for name in given:
        if name not in known:
            raise OptionError(f"TrainingArguments has no {name!r}.{nearest(name, known)}")


def _convert_length(args: TrainerArguments, found: Conversion) -> None:
    for old, new in _OLD_SIZES.items():
        if args[old]:
            args.given[new] = args.peek(old)
    for name, ours in SAME.items():
        value = args[name]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value not in OFF or (ours == "seed" and value is not None):
            found.fit[ours] = repr(value)
    if args["max_steps"] > 0:  # the Trainer then ignores the epochs
        found.fit["steps"] = repr(args["max_steps"])
        found.fit.pop("epochs", None)
    if args["auto_find_batch_size"]:
        found.fit["micro_batch"] = "'auto'"
    resume = args["resume_from_checkpoint"]
    if resume not in OFF:
        found.fit["resume"] = repr("auto" if resume in (True, "True", "true") else resume)


_OLD_SIZES = {
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
}


def _convert_numbers(args: TrainerArguments, found: Conversion) -> None:
    asked = [name for name in ("bf16", "fp16", "tf32") if args[name]]
    if asked:
        found.fit["precision"] = repr(asked[0])
    if {"bf16", "fp16"} <= {*asked}:
        found.notes["fp16"] = "bf16 is given too, and the Trainer refuses the two together"
    asked_for = [args[name] for name in _CHECKPOINTING]  # both count as read
    if any(asked_for):
        found.fit["activation_checkpointing"] = "'full'"
    for name in _CHECKPOINTING:
        kwargs = args.peek(f"{name}_kwargs")
        if kwargs in (None, {}, {"use_reentrant": False}):  # it is always so here
            args.use(f"{name}_kwargs")
    compile_ = {ours: args[f"torch_compile_{ours}"] for ours in ("mode", "backend")}
    compile_["backend"] = compile_["backend"] or args["torchdynamo"]
    settings = ", ".join(f"{name}={value!r}" for name, value in compile_.items() if value)
    if settings:
        found.fit["compile"] = f"Compile({settings})"
    elif args.peek("torch_compile"):
        found.fit["compile"] = "True"
    args.use("torch_compile")
    if args["use_cpu"] or args["no_cuda"]:
        found.fit["accelerator"] = "'cpu'"
    elif args["use_mps_device"]:
        found.fit["accelerator"] = "'mps'"
    if args["disable_tqdm"]:
        found.fit["progress"] = "False"
    debug = args.peek("debug") or []
    debug = debug.split() if isinstance(debug, str) else [str(each) for each in debug]
    if "underflow_overflow" in debug:
        found.fit["debug"] = "'numerics'"
    rest = [each for each in debug if each != "underflow_overflow"]
    args.use("debug")
    if rest:
        found.notes["debug"] = f"{', '.join(rest)} has no counterpart"


def _convert_data(args: TrainerArguments, found: Conversion) -> None:
    for name, ours in LOADER.items():
        if args[name] not in OFF:
            found.loader[ours] = repr(args[name])
    if args["dataloader_pin_memory"] is False:
        found.loader["pin_memory"] = "False"
    sampling = args["train_sampling_strategy"]
    if args["group_by_length"] or sampling == "group_by_length":
        column = args["length_column_name"]
        found.loader["group_by_length"] = "True" if column == "length" else repr(column)
    elif sampling == "sequential":
        found.loader["shuffle"] = "False"
    elif sampling != "random":
        found.notes["train_sampling_strategy"] = f"Loader has no {sampling!r}"
    config = args["accelerator_config"] or {}
    always = {"even_batches": True, "use_seedable_sampler": True, "use_configured_state": False}
    parts = config.items() if isinstance(config, dict) else [(config, True)]
    for part, value in parts:
        if value not in OFF and always.get(part) != value:
            reason = TRAINER_NAMES["accelerator_config"]
            found.notes[f"accelerator_config[{part!r}]"] = f"{value!r}: {reason}"


def _convert_task(args: TrainerArguments, found: Conversion) -> None:
    """Convert what is an argument of HFTask."""
    if args["label_names"]:
        found.task["label_names"] = repr(list(args["label_names"]))
    smoothing = args["label_smoothing_factor"]
    if smoothing:
        found.smoothing = float(smoothing)
    if not args["predict_with_generate"]:
        return
    settings = {
        ours: args[theirs] for theirs, ours in _GENERATION.items() if args[theirs] is not None
    }
    if args.peek("generation_config") is not None:
        config = args["generation_config"]
        settings |= config if isinstance(config, dict) else {}
        if not isinstance(config, dict):
            found.notes["generation_config"] = "set model.generation_config in the script"
    found.task["generate"] = repr(settings)


def _convert_objects(args: TrainerArguments, found: Conversion) -> None:
    strategy = strategy_source(args, found.notes)
    if strategy:
        found.fit["strategy"] = strategy
    if args.given.get("run_name") == args.peek("output_dir"):
        args.use("run_name")  # version 4 fills it in
    loggers, found.imports = logger_sources(args, found.notes)
    if loggers:
        found.fit["loggers"] = loggers
    if args["push_to_hub"]:
        found.fit["hooks"] = f"[{hub_source(args)}]"
        found.imports.append("from loopkit.hooks import PushToHub")


def converted(text: str, kind: str) -> Conversion | Script:
    """Convert what a file holds, without running it: only literal values are taken.

    Args:
        text: its content.
        kind: ".py", ".json", ".yaml" or ".yml".

    Raises:
        ValueError, SyntaxError: the text cannot be read.
        OptionError: it holds no arguments of a Trainer, or some that no Trainer has.
    """
    if kind in (".yaml", ".yml"):
        return convert_lightning(read_yaml(text))
    if kind != ".py":
        found = json.loads(text)
        if isinstance(found, dict):
            return convert(found)
        raise ValueError("it holds no object")
    tree = ast.parse(text)
    if holds_trainer(tree):
        return convert_lightning(read_python(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("TrainingArguments"):
            named = [keyword for keyword in node.keywords if keyword.arg is not None]
            return convert({str(each.arg): ast.literal_eval(each.value) for each in named})
        if isinstance(node, ast.Dict) and node.keys:
            return convert(dict(ast.literal_eval(node)))
    raise ValueError("it holds no TrainingArguments(...), no Trainer(...) and no dict")


def _read(given: str) -> Conversion | Script:
    """Convert a file, a pasted call, or standard input."""
    try:
        if given == "-" or "Trainer(" in given or "TrainingArguments(" in given:
            return converted(sys.stdin.read() if given == "-" else given, ".py")
        return converted(Path(given).read_text(), Path(given).suffix)
    except (OSError, ValueError, SyntaxError) as error:
        raise OptionError(f"convert-args cannot read {given}: {error}") from error


def run(argv: Sequence[str]) -> int:
    """Print the conversion of a file; return the exit code."""
    parser = CommandParser(
        "convert-args",
        "Print the Fit for the arguments of a Hugging Face Trainer or of Lightning's Trainer.",
    )
    parser.add_argument(
        "file",
        help="JSON, a Python file with TrainingArguments(...), a dict or Lightning's Trainer(...), "
        "the YAML of a LightningCLI, the call itself, or - for Python on standard input",
    )
    print(_read(parser.parse_args(argv).file).source())
    return 0
