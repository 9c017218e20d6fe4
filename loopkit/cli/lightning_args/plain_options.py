"""The plain arguments of Lightning's Trainer, as options of Fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loopkit.cli.lightning_args.call_arguments import Arguments, WrittenCall
from loopkit.cli.lightning_args.lightning_script import Script
from loopkit.foreign_names import FOREIGN_NAMES, Reason
from loopkit.foreign_values import VALUES

# Arguments whose value is an option of Fit.
_SAME = {
    "num_nodes": "nodes", "accumulate_grad_batches": "accumulate", "default_root_dir": "run_dir",
    "limit_train_batches": "limit_train",
}  # fmt: skip
_UNITS = {"weeks": 604_800, "days": 86_400, "hours": 3600, "minutes": 60, "seconds": 1}
_CPU = {"CPUAccelerator": "cpu", "CUDAAccelerator": "cuda", "MPSAccelerator": "mps"}


def reason_of(name: str) -> str:
    """Return why an argument of the Trainer has no counterpart, or what loopkit has instead."""
    meant = _REASONS.get(name) or FOREIGN_NAMES["Fit"].get(name, "")
    return meant if isinstance(meant, Reason) or name in _REASONS else f"here that is {meant}"


_REASONS = {
    "reload_dataloaders_every_n_epochs": "loaders are made once: give the data set set_epoch(epoch)",
    "use_distributed_sampler": "ranks share the data by position, whatever sampler there is",
    "inference_mode": "evaluation always runs without gradients",
    "limit_predict_batches": "give fewer batches: Fit.predict(task, data=...)",
    "limit_test_batches": "limit_eval limits the test too",
    "enable_autolog_hparams": "a run always records the arguments of the module",
    "model_registry": "push a finished run: hooks=[PushToHub('me/model')]",
    "deterministic": "give deterministic=True: torch then raises where Lightning warns",
    "min_epochs": "EarlyStop counts evaluations, and eval_after='5 epochs' delays them",
    "min_steps": "EarlyStop counts evaluations, and eval_after='500 steps' delays them",
}


def convert_options(args: Arguments, found: Script) -> None:
    """Convert what is a number, a text or a flag."""
    for name, ours in _SAME.items():
        if args.is_set(name) and (value := args[name]) is not None and value not in (0, 1.0):
            found.fit[ours] = repr(value)
    _convert_length(args, found)
    _convert_machine(args, found)
    _convert_evaluation(args, found)
    _convert_step(args, found)
    _convert_debugging(args, found)


def _convert_length(args: Arguments, found: Script) -> None:
    epochs, steps, seconds = args["max_epochs"], args["max_steps"], in_seconds(args["max_time"])
    if steps is not None and steps >= 0:
        found.fit["steps"] = repr(steps)
    if seconds:
        found.fit["time"] = repr(seconds)
    if epochs is None and steps == -1 and not seconds:
        epochs = 1000  # Lightning's default
    if epochs is not None and epochs >= 0:
        found.fit["epochs"] = repr(epochs)
    elif steps == -1 and not seconds:
        args.note("max_epochs", "a run has an end: give epochs, steps or time")


def in_seconds(value: Any) -> float | int | None:
    """Return "DD:HH:MM:SS", a dict of units or a timedelta in seconds; None for anything else."""
    if isinstance(value, str) and re.fullmatch(r"\d+(:\d+){3}", value):
        days, hours, minutes, seconds = map(int, value.split(":"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if isinstance(value, WrittenCall) and value.name == "timedelta":
        value = {**dict(zip(("days", "seconds"), value.positional)), **value.named}
    if isinstance(value, Mapping) and value and value.keys() <= _UNITS.keys():
        total = sum(_UNITS[unit] * amount for unit, amount in value.items())
        return total if isinstance(total, (int, float)) else None
    return None


def translated(option: str, value: Any) -> str:
    """Return the source of loopkit's value for Lightning's, or a Reason where it has none."""
    key = str(value).lower() if isinstance(value, str) else str(value)
    meant = VALUES[option].get(key, repr(value))
    return meant if isinstance(meant, Reason) else meant.replace('"', "'")


def _convert_machine(args: Arguments, found: Script) -> None:
    accelerator = args["accelerator"]
    if isinstance(accelerator, WrittenCall):
        accelerator = _CPU.get(accelerator.name, accelerator.name)
    source = translated("accelerator", accelerator)
    if isinstance(source, Reason):
        args.note("accelerator", source)
    elif accelerator != "auto":
        found.fit["accelerator"] = source
    _convert_devices(args, found)
    precision = args["precision"]
    if precision is not None:
        set_precision(args, found, precision)


def set_precision(args: Arguments, found: Script, precision: Any, name: str = "precision") -> None:
    """Convert a precision, of the Trainer or of a plugin."""
    if "transformer-engine" in str(precision):
        args.note(name, "loopkit has no FP8: give precision='bf16'")
        return
    source = translated("precision", precision)
    if source != "'fp32'":
        found.fit["precision"] = source


def _convert_devices(args: Arguments, found: Script) -> None:
    devices = args["devices"]
    if isinstance(devices, str) and re.fullmatch(r"[\d,\s]*,[\d,\s]*", devices):
        devices = [int(part) for part in devices.split(",") if part.strip()]
    if isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        listed = ",".join(map(str, devices))
        args.note("devices", f"to choose them, start the script with CUDA_VISIBLE_DEVICES={listed}")
        devices = len(devices)
    if devices not in ("auto", -1, "-1", None):
        found.fit["devices"] = repr(devices)


def _convert_evaluation(args: Arguments, found: Script) -> None:
    interval, epochs = args["val_check_interval"], args["check_val_every_n_epoch"]
    accumulate = args.given.get("accumulate_grad_batches", 1)
    batches = accumulate if isinstance(accumulate, int) else 1
    seconds = in_seconds(interval)
    if seconds:
        found.fit["eval_every"] = f"'{seconds:g} s'"
    elif isinstance(interval, int) and not isinstance(interval, bool):
        found.fit["eval_every"] = f"'{max(1, interval // batches)} steps'"
        if epochs is not None:
            args.note("val_check_interval", "here steps count from the start of the run, and in "
                      "Lightning batches from the start of each epoch")  # fmt: skip
    elif isinstance(interval, float) and interval != 1.0:
        found.fit["eval_every"] = f"'{interval:g} epochs'"
    elif epochs not in (None, 1):
        found.fit["eval_every"] = f"'{epochs} epochs'"
    if interval not in (None, 1.0) and epochs not in (None, 1):
        args.note(
            "check_val_every_n_epoch", "val_check_interval is given too: eval_every takes one"
        )
    limit = args["limit_val_batches"]
    if limit == 0 and limit is not None:
        found.fit["eval_every"] = "'never'"
    elif limit not in (None, 1.0):
        found.fit["limit_eval"] = repr(limit)
    if args.is_set("limit_test_batches") and args.peek("limit_test_batches") == limit:
        args.use("limit_test_batches")
    first = args["num_sanity_val_steps"]
    if first == -1:
        found.fit["eval_first"] = "True"
    elif first:
        args.note("num_sanity_val_steps", "dry_run=True tries everything once before a run, and "
                  "eval_first=True evaluates whole sets")  # fmt: skip
    if args.is_set("limit_train_batches") and args.peek("limit_train_batches") in (0, 0.0):
        args.note("limit_train_batches", "evaluate without training: Fit.evaluate(task)")


def _convert_step(args: Arguments, found: Script) -> None:
    value, algorithm = args["gradient_clip_val"], args["gradient_clip_algorithm"]
    if value:
        found.fit["clip_value" if algorithm == "value" else "clip_norm"] = repr(value)
    elif algorithm:
        args.note(
            "gradient_clip_algorithm", "gradient_clip_val is not given, so nothing is clipped"
        )
    every = args["log_every_n_steps"]
    if every is not None and every != 50:
        found.fit["log_every"] = f"'{every} steps'" if every else "'never'"
    if args.is_set("deterministic") and args.peek("deterministic") is True:
        args.use("deterministic")
        found.fit["deterministic"] = "True"
    if args["benchmark"]:
        found.before.append("torch.backends.cudnn.benchmark = True")
    if args["sync_batchnorm"]:
        found.synchronised = True
    if args["enable_progress_bar"] is False:
        found.fit["progress"] = "False"
    if args["enable_checkpointing"] is False:
        found.saves = False


def _convert_debugging(args: Arguments, found: Script) -> None:
    overfit = args["overfit_batches"]
    if isinstance(overfit, int) and overfit:
        found.fit["overfit"] = repr(overfit)
    elif overfit:
        args.note("overfit_batches", "overfit takes a number of batches, not a part")
    if args["detect_anomaly"]:
        found.fit["debug"] = "'numerics'"
    fast = args["fast_dev_run"]
    if fast is True or fast == 1:
        found.fit["dry_run"] = "True"
    elif fast:
        found.fit |= {
            "epochs": "1",
            "limit_train": repr(fast),
            "limit_eval": repr(fast),
            "loggers": "None",
        }
        found.saves = False
    if args["barebones"]:
        found.fit |= {"loggers": "None", "progress": "False"}
        found.saves = False
