"""Models of other libraries as tasks: transformers models, adapters of peft, LightningModules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.interop.huggingface import HFTask
from loopkit.lazy import lazy_names

if TYPE_CHECKING:
    from loopkit.interop.lightning.module_task import LightningTask

__all__ = ["HFTask", "LightningTask"]

# It imports torchmetrics, which the rest of loopkit does without.
__getattr__, __dir__ = lazy_names("loopkit.interop", {"LightningTask": "lightning.module_task"})
