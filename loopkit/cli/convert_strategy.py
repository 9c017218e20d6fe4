"""The strategy that a Trainer's arguments ask for, as Python source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopkit.cli.trainer_arguments import OFF, TrainerArguments

_DDP = {
    "ddp_find_unused_parameters": "find_unused_parameters", "ddp_bucket_cap_mb": "bucket_cap_mb",
    "ddp_broadcast_buffers": "broadcast_buffers", "ddp_static_graph": "static_graph", "ddp_timeout": "timeout",
}  # fmt: skip
# The parts of fsdp_config that say how the Trainer's FSDP works inside, or that FSDP2 always does.
_FSDP_ALWAYS = {
    "version", "sync_module_states", "use_orig_params", "limit_all_gathers", "state_dict_type", "auto_wrap_policy",
}  # fmt: skip


def strategy_source(args: TrainerArguments, notes: dict[str, str]) -> str:
    """Return ``DeepSpeed(...)``, ``FSDP(...)`` or ``DDP(...)``; "" if nothing asks for one."""
    if args["deepspeed"]:
        for name in ("fsdp", "fsdp_config", *_DDP):
            if args.is_set(name):
                notes[name] = "deepspeed is given, and a run has one strategy"
        return f"DeepSpeed(config={args['deepspeed']!r})"
    if args["fsdp"]:
        for name in _DDP:
            if args.is_set(name):
                notes[name] = "fsdp is given, and a run has one strategy"
        return f"FSDP({_source(_fsdp(args, notes))})"
    config = args.peek("fsdp_config")
    if isinstance(config, dict) and all(value in OFF for value in config.values()):
        args.use("fsdp_config")  # version 4 fills it in
    settings = {ours: args[theirs] for theirs, ours in _DDP.items() if _is_given(args, theirs)}
    return f"DDP({_source(settings)})" if settings else ""


def _is_given(args: TrainerArguments, name: str) -> bool:
    """Return whether the argument differs from the default, which for flags is None, not False."""
    return args.is_set(name) or args.given.get(name) is False


def _fsdp(args: TrainerArguments, notes: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of FSDP for the Trainer's ``fsdp`` and ``fsdp_config``."""
    modes = args["fsdp"]
    if isinstance(modes, bool):
        modes = []
    elif isinstance(modes, str):
        modes = modes.split()
    modes = [str(mode).lower() for mode in modes]
    config = _fsdp_config(args)
    settings: dict[str, Any] = {}
    if "offload" in modes or config.pop("offload_params", 0) or config.pop("cpu_offload", 0):
        settings["offload"] = True
    if "shard_grad_op" in modes or config.pop("reshard_after_forward", True) is False:
        settings["reshard_after_forward"] = False
    classes, size = (
        config.pop("transformer_layer_cls_to_wrap", None),
        config.pop("min_num_params", 0),
    )
    if classes:
        settings["wrap"] = [classes] if isinstance(classes, str) else list(classes)
    elif size:
        settings["wrap"] = int(size)
    if config.pop("forward_prefetch", 0) or config.pop("backward_prefetch", 0):
        settings["prefetch"] = 1
    for mode in modes:
        if mode not in ("full_shard", "shard_grad_op", "auto_wrap", "offload"):
            notes["fsdp"] = f"{mode}: choose FSDP(replicas=...) or DDP()"
    for name, value in config.items():
        if value not in OFF and name not in _FSDP_ALWAYS:
            notes[f"fsdp_config[{name!r}]"] = "FSDP has no such argument"
    return settings


def _fsdp_config(args: TrainerArguments) -> dict[str, Any]:
    """Return ``fsdp_config``, read from its file if it is a path, with the older arguments."""
    given: Any = args["fsdp_config"] or {}
    if isinstance(given, str):
        given = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text())
    config = {str(name).removeprefix("fsdp_"): value for name, value in given.items()}
    for name in ("min_num_params", "transformer_layer_cls_to_wrap"):
        if args[f"fsdp_{name}"]:
            config.setdefault(name, args.peek(f"fsdp_{name}"))
    return config


def _source(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
