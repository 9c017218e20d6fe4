"""loopkit: a training framework for PyTorch. Write a Task, run it with Fit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loopkit.version import __version__ as __version__

if TYPE_CHECKING:
    from loopkit.data.loader import Loader
    from loopkit.distributed.environment import is_rank_zero
    from loopkit.distributed.gather import all_gather
    from loopkit.distributed.rank_zero import rank_zero_first, rank_zero_only
    from loopkit.events import Hook
    from loopkit.fit.fit import Fit
    from loopkit.loops import ClosureStep, EpochLoop, EvalLoop, PredictLoop, StepLoop
    from loopkit.options import Checkpoint
    from loopkit.result import Result
    from loopkit.run import Progress, Run
    from loopkit.strategies.base import Strategy
    from loopkit.strategies.compile import Compile
    from loopkit.strategies.ddp import DDP
    from loopkit.strategies.deepspeed.strategy import DeepSpeed
    from loopkit.strategies.fsdp import FSDP
    from loopkit.strategies.single import SingleDevice
    from loopkit.strategies.tensor_parallel import TensorParallel
    from loopkit.task import Task

__all__ = [
    "DDP", "FSDP", "Checkpoint", "ClosureStep", "Compile", "DeepSpeed", "EpochLoop", "EvalLoop", "Fit", "Hook",
    "Loader", "PredictLoop", "Progress", "Result", "Run", "SingleDevice", "StepLoop", "Strategy", "Task",
    "TensorParallel", "all_gather", "is_rank_zero", "rank_zero_first", "rank_zero_only",
]  # fmt: skip

# Imported when first asked for: `import loopkit` and `loopkit --help` do without torch.
_HOMES = {
    "loopkit.data.loader": ("Loader",),
    "loopkit.distributed.environment": ("is_rank_zero",),
    "loopkit.distributed.gather": ("all_gather",),
    "loopkit.distributed.rank_zero": ("rank_zero_first", "rank_zero_only"),
    "loopkit.events": ("Hook",),
    "loopkit.fit.fit": ("Fit",),
    "loopkit.loops": ("ClosureStep", "EpochLoop", "EvalLoop", "PredictLoop", "StepLoop"),
    "loopkit.options": ("Checkpoint",),
    "loopkit.result": ("Result",),
    "loopkit.run": ("Progress", "Run"),
    "loopkit.strategies.base": ("Strategy",),
    "loopkit.strategies.compile": ("Compile",),
    "loopkit.strategies.ddp": ("DDP",),
    "loopkit.strategies.deepspeed.strategy": ("DeepSpeed",),
    "loopkit.strategies.fsdp": ("FSDP",),
    "loopkit.strategies.single": ("SingleDevice",),
    "loopkit.strategies.tensor_parallel": ("TensorParallel",),
    "loopkit.task": ("Task",),
}
_ROOMS = (
    "checkpoint", "console", "data", "distributed", "errors", "hooks", "interop", "loggers", "loops",
    "metrics", "optim", "strategies",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"loopkit.{name}")
    for home, names in _HOMES.items():
        if name in names:
            value = globals()[name] = getattr(importlib.import_module(home), name)
            return value
    from loopkit.foreign_values import missing_attribute

    raise missing_attribute("loopkit", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
