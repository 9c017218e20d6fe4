"""LRMonitor: the learning rate of every parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loopkit.events import Hook

if TYPE_CHECKING:
    from loopkit.run import Run


class LRMonitor(Hook):
    """Logs the learning rate of each group with every log: ``lr/decay``, ``lr/no_decay`` …

    A group goes by its name, which those of loopkit.optim have, or else by its number. With several
    optimizers the optimizer's name comes first (``lr/generator/decay``).
    """

    may_request = False

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Note the rates where a log may follow."""
        # Only at the end of an epoch of unknown length can a log come that the agenda does not know
        # of.
        if run.progress.step < run.triggers.next and run.length.steps_per_epoch is not None:
            return
        for name, optimizer in run.optimizers.items():
            prefix = f"lr/{name}" if len(run.optimizers) > 1 else "lr"
            for index, group in enumerate(optimizer.param_groups):
                rate = group["lr"]
                value = rate.clone() if isinstance(rate, Tensor) else rate
                run.accumulator.add(f"{prefix}/{group.get('name', index)}", value, reduce="last")
