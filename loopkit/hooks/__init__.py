"""Hooks that come with loopkit, each loaded when first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.lazy import lazy_names

if TYPE_CHECKING:
    from loopkit.hooks.curves import Curves
    from loopkit.hooks.early_stop import EarlyStop
    from loopkit.hooks.ema import EMA
    from loopkit.hooks.find_lr import FindLR
    from loopkit.hooks.grad_monitor import GradMonitor
    from loopkit.hooks.lr_monitor import LRMonitor
    from loopkit.hooks.model_summary import ModelSummary
    from loopkit.hooks.numerics import Numerics
    from loopkit.hooks.optuna_prune import OptunaPrune
    from loopkit.hooks.profiler import Profiler
    from loopkit.hooks.push_to_hub import PushToHub
    from loopkit.hooks.ray_report import RayReport
    from loopkit.hooks.swa import SWA
    from loopkit.hooks.throughput import Throughput
    from loopkit.hooks.unfreeze import Unfreeze

__all__ = [
    "EMA", "SWA", "Curves", "EarlyStop", "FindLR", "GradMonitor", "LRMonitor", "ModelSummary", "Numerics",
    "OptunaPrune", "Profiler", "PushToHub", "RayReport", "Throughput", "Unfreeze",
]  # fmt: skip

_HOMES = {
    "Curves": "curves", "EarlyStop": "early_stop", "EMA": "ema", "FindLR": "find_lr", "GradMonitor": "grad_monitor",
    "LRMonitor": "lr_monitor", "ModelSummary": "model_summary", "Numerics": "numerics",
    "OptunaPrune": "optuna_prune", "Profiler": "profiler",
    "PushToHub": "push_to_hub", "RayReport": "ray_report", "SWA": "swa", "Throughput": "throughput",
    "Unfreeze": "unfreeze",
}  # fmt: skip

__getattr__, __dir__ = lazy_names("loopkit.hooks", _HOMES)
