"""LRMonitor: the learning rate of every parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from loopkit.events import Hook

if TYPE_CHECKING:
    from loopkit.run import Run


class LRMonitor(Hook):
    """Log the learning rate of each parameter group with every log: ``lr/decay``, ``lr/no_decay``.

    The name of a group is its ``"name"``, which groups of ``loopkit.optim`` have, or else its
    number. With several optimizers, the name of the optimizer comes first (``lr/generator/decay``).

    Examples:
        >>> Fit(hooks=[LRMonitor()]).run(task)
    """

    may_request = False

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Note the rates if a log may follow this step."""
        # The triggers know the step of each log, but for that at the end of an epoch of unknown
        # length.
        if run.progress.step < run.triggers.next and run.length.steps_per_epoch is not None:
            return
        for name, optimizer in run.optimizers.items():
            prefix = f"lr/{name}" if len(run.optimizers) > 1 else "lr"
            for index, group in enumerate(optimizer.param_groups):
                rate = group["lr"]
                value = rate.clone() if isinstance(rate, Tensor) else rate
                run.accumulator.add(f"{prefix}/{group.get('name', index)}", value, reduce="last")
