"""loopkit: a training framework for PyTorch. Write a Task, run it with Fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.lazy import lazy_names
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
    from loopkit.strategies import DDP, FSDP, DeepSpeed
    from loopkit.strategies.base import Strategy
    from loopkit.strategies.compile import Compile
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
    "data.loader": ("Loader",),
    "distributed.environment": ("is_rank_zero",),
    "distributed.gather": ("all_gather",),
    "distributed.rank_zero": ("rank_zero_first", "rank_zero_only"),
    "events": ("Hook",),
    "fit.fit": ("Fit",),
    "loops": ("ClosureStep", "EpochLoop", "EvalLoop", "PredictLoop", "StepLoop"),
    "options": ("Checkpoint",),
    "result": ("Result",),
    "run": ("Progress", "Run"),
    "strategies": ("DDP", "FSDP", "DeepSpeed"),
    "strategies.base": ("Strategy",),
    "strategies.compile": ("Compile",),
    "strategies.single": ("SingleDevice",),
    "strategies.tensor_parallel": ("TensorParallel",),
    "task": ("Task",),
}
_ROOMS = (
    "checkpoint", "console", "data", "distributed", "errors", "hooks", "interop", "loggers", "loops",
    "metrics", "optim", "strategies",
)  # fmt: skip

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__getattr__, __dir__ = lazy_names("loopkit", _HOME_OF | dict.fromkeys(_ROOMS, ""))
