"""ModelSummary: the model layer by layer, when training starts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from loopkit.console.layer_table import layer_table
from loopkit.errors import OptionError
from loopkit.events import Hook
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run


@checks_keywords
class ModelSummary(Hook):
    """Prints the model's layers, their classes and parameters, to stderr
    (``loopkit.console.summary``).

    Args:
        depth: levels of modules below the task.

    Raises:
        OptionError: ``depth`` is not a whole number of at least 0.
    """

    def __init__(self, depth: int = 2) -> None:
        if not isinstance(depth, int) or isinstance(depth, bool) or depth < 0:
            raise OptionError(f"ModelSummary(depth={depth!r}): give a whole number of at least 0")
        self._depth = depth

    def on_fit_start(self, run: Run) -> None:
        """Print it, on the first rank."""
        if run.strategy.rank == 0:
            print(layer_table(run.task, depth=self._depth), file=sys.stderr)
