"""Logger: where rows of numbers go; and Loggers, which keeps one that fails from hurting the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from loopkit.errors import LoopkitWarning


class Logger:
    """A destination of logged values. Override what it can take; rows come in rising steps."""

    name = ""

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """The run starts at ``step`` (0, or where it resumes: later rows of an earlier attempt are
        void).
        """

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row of numbers."""

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Metrics that are no numbers: arrays or tensors by name."""

    def flush(self) -> None:
        """Bring what is buffered to where it belongs."""

    def end(self, status: str) -> None:
        """How the run went: "finished", "stopped", "interrupted" or "failed"; ``close`` follows."""

    def close(self) -> None:
        """The run is over."""


class Loggers:
    """The loggers of a run. One that raises is reported once and left out from then on; training is
    unchanged.
    """

    def __init__(self, loggers: Iterable[Logger] = ()) -> None:
        self._loggers = list(loggers)

    def __iter__(self) -> Any:
        return iter(self._loggers)

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Open each."""
        self._each("open", lambda logger: logger.open(run_dir, step, hparams))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand a row to each."""
        self._each("log", lambda logger: logger.log(values, step))

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Hand arrays to each, if there are any."""
        if arrays:
            self._each("log_arrays", lambda logger: logger.log_arrays(arrays, step))

    def flush(self) -> None:
        """Flush each."""
        self._each("flush", lambda logger: logger.flush())

    def close(self, status: str = "finished") -> None:
        """Tell each how the run went, and close it."""
        self._each("end", lambda logger: logger.end(status))
        self._each("close", lambda logger: logger.close())

    def _each(self, what: str, call: Callable[[Logger], None]) -> None:
        for logger in list(self._loggers):
            try:
                call(logger)
            except Exception as error:
                self._loggers.remove(logger)
                warnings.warn(
                    f"the logger {type(logger).__name__} failed in {what} and is left out from now "
                    f"on: "
                    f"{type(error).__name__}: {error}",
                    LoopkitWarning,
                    stacklevel=3,
                )
