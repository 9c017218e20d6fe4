"""Logger, a destination of logged values; and Loggers, which drops a logger that fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loopkit.errors import LoopkitWarning


class Logger:
    """A destination of logged values. Override the methods for what it can store.

    Example:
        >>> class Printer(Logger):
        ...     def log(self, values, step):
        ...         print(step, values)
    """

    name = ""

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Start to log.

        Args:
            run_dir: the run's directory.
            step: 0, or the step from which the run resumes. Rows of an earlier attempt with a
                greater step are void.
            hparams: nested: "task", "hparams" and "options".
        """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Store one row of numbers. Steps never fall."""

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Store metrics that are no numbers: arrays or tensors by name."""

    def flush(self) -> None:
        """Write everything that is buffered."""

    def end(self, status: str) -> None:
        """Note how the run ended: "finished", "stopped", "interrupted" or "failed"."""

    def close(self) -> None:
        """Close everything; called after ``end``."""


class Loggers:
    """The loggers of a run. One that raises is dropped with a warning, and training continues."""

    def __init__(self, loggers: Iterable[Logger] = ()) -> None:
        self._loggers = list(loggers)

    def __iter__(self) -> Any:
        return iter(self._loggers)

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Open all loggers."""
        self._each("open", lambda logger: logger.open(run_dir, step, hparams))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Give a row to all loggers."""
        self._each("log", lambda logger: logger.log(values, step))

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Give arrays to all loggers, if there are any."""
        if arrays:
            self._each("log_arrays", lambda logger: logger.log_arrays(arrays, step))

    def flush(self) -> None:
        """Flush all loggers."""
        self._each("flush", lambda logger: logger.flush())

    def close(self, status: str = "finished") -> None:
        """Close all loggers, and let them note how the run ended."""
        self._each("end", lambda logger: logger.end(status))
        self._each("close", lambda logger: logger.close())

    def _each(self, method: str, call: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                call(logger)
            except Exception as error:
                self._loggers.remove(logger)
                warnings.warn(
                    f"the logger {type(logger).__name__} failed in {method} and is left out from "
                    f"now on: {type(error).__name__}: {error}",
                    LoopkitWarning,
                    stacklevel=3,
                )
