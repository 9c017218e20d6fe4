"""ModelSummary: the model layer by layer, printed when training starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from loopkit.checks import checked_int
from loopkit.console.layer_table import layer_table
from loopkit.events import Hook
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run


@checks_keywords
class ModelSummary(Hook):
    """Print the model's layers with their classes and parameters to stderr, on rank 0.

    ``loopkit.console.layer_table`` has the same table as an object, with shapes of outputs too.

    Examples:
        >>> Fit(hooks=[ModelSummary(depth=1)]).run(task)

    Args:
        depth: levels of modules below the task.

    Raises:
        OptionError: ``depth`` is not a whole number of at least 0.
    """

    def __init__(self, depth: int = 2) -> None:
        self._depth = checked_int(depth, "ModelSummary(depth=)", at_least=0)

    def on_fit_start(self, run: Run) -> None:
        """Print the table."""
        if run.strategy.rank == 0:
            print(layer_table(run.task, depth=self._depth), file=sys.stderr)
