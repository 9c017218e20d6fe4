"""The strategy that a Trainer's arguments ask for, as Python source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_DDP = {
    "ddp_find_unused_parameters": "find_unused_parameters", "ddp_bucket_cap_mb": "bucket_cap_mb",
    "ddp_broadcast_buffers": "broadcast_buffers", "ddp_static_graph": "static_graph", "ddp_timeout": "timeout",
}  # fmt: skip


def strategy_source(given: Mapping[str, Any]) -> str:
    """Return ``DeepSpeed(...)``, ``FSDP(...)`` or ``DDP(...)``; "" if nothing asks for one."""
    if given.get("deepspeed"):
        return f"DeepSpeed(config={given['deepspeed']!r})"
    if given.get("fsdp"):
        return f"FSDP({_arguments(_fsdp(given))})"
    settings = {
        ours: given[theirs] for theirs, ours in _DDP.items() if given.get(theirs) is not None
    }
    return f"DDP({_arguments(settings)})" if settings else ""


def _fsdp(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of FSDP for the Trainer's ``fsdp`` and ``fsdp_config``."""
    modes = given["fsdp"]
    if isinstance(modes, bool):
        modes = []
    elif isinstance(modes, str):
        modes = modes.split()
    modes = [str(mode) for mode in modes]
    config = {
        str(name).removeprefix("fsdp_"): value
        for name, value in (given.get("fsdp_config") or {}).items()
    }
    settings: dict[str, Any] = {}
    if "offload" in modes or config.get("offload_params") or config.get("cpu_offload"):
        settings["offload"] = True
    if "shard_grad_op" in modes or config.get("reshard_after_forward") is False:
        settings["reshard_after_forward"] = False
    classes = config.get("transformer_layer_cls_to_wrap")
    size = config.get("min_num_params")
    if classes:
        settings["wrap"] = [classes] if isinstance(classes, str) else list(classes)
    elif size:
        settings["wrap"] = int(size)
    if config.get("forward_prefetch") or config.get("backward_prefetch"):
        settings["prefetch"] = 1
    return settings


def _arguments(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())
