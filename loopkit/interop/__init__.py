"""Models of other libraries as tasks: transformers models, adapters of peft, LightningModules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loopkit.foreign_values import missing_attribute
from loopkit.interop.huggingface import HFTask

if TYPE_CHECKING:
    from loopkit.interop.lightning.module_task import LightningTask

__all__ = ["HFTask", "LightningTask"]


def __getattr__(name: str) -> Any:
    if name == "LightningTask":
        from importlib import import_module

        # It imports torchmetrics, which the rest of loopkit does without.
        value = globals()[name] = import_module(
            "loopkit.interop.lightning.module_task"
        ).LightningTask
        return value
    raise missing_attribute("loopkit.interop", name)
