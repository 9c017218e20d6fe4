"""A LightningModule's class as a Task class, for the command line."""

from __future__ import annotations

from functools import wraps
from typing import Any

from loopkit.interop.lightning.module_task import LightningTask


def as_task(kind: Any, datamodule: Any = None) -> type[LightningTask]:
    """Return a Task class that takes the constructor's arguments of a LightningModule.

    Args:
        kind: the class of the module.
        datamodule: the class of its data module, which is made without arguments.
    """

    @wraps(kind.__init__)
    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        data = None if datamodule is None else datamodule()
        LightningTask.__init__(self, kind(*arguments, **keywords), data)

    about = {"__init__": init, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (LightningTask,), about)
