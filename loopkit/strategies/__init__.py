"""Where and how a task runs: devices, precision, clipping, sharding and state, behind Strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.lazy import lazy_names

if TYPE_CHECKING:
    from loopkit.strategies.ddp import DDP
    from loopkit.strategies.deepspeed.strategy import DeepSpeed
    from loopkit.strategies.fsdp import FSDP

__all__ = ["DDP", "FSDP", "DeepSpeed"]

# Imported when a run uses them: a run on one device needs none of them.
_HOMES = {"DDP": "ddp", "DeepSpeed": "deepspeed.strategy", "FSDP": "fsdp"}
__getattr__, __dir__ = lazy_names("loopkit.strategies", _HOMES)
