"""Logger, a destination of logged values; and Loggers, which drops a logger that fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loopkit.errors import LoopkitWarning, OptionError, nearest
from loopkit.loggers.media import Kind, Media


class Logger:
    """A destination of logged values. Override the methods for what it can store.

    Examples:
        >>> class Printer(Logger):
        ...     def log(self, values, step):
        ...         print(step, values)
    """

    name = ""
    # The kinds of media that it stores. None: it keeps numbers alone, and another logger may store
    # media.
    media: Sequence[Kind] | None = None

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

    def log_media(self, media: Media, step: int) -> None:
        """Store an image, a text, a histogram or audio, as ``Media.converted`` returns it."""

    def flush(self) -> None:
        """Write everything that is buffered."""

    def files(self) -> Sequence[Path]:
        """Return the files that hold the rows. A checkpoint waits until the disk has their rows."""
        return ()

    def end(self, status: str) -> None:
        """Note how the run ended: "finished", "stopped", "interrupted" or "failed"."""

    def close(self) -> None:
        """Close everything; called after ``end``."""


class Loggers:
    """The loggers of a run. One that raises is dropped with a warning, and training continues."""

    def __init__(self, loggers: Iterable[Logger] = (), *, silent: bool = False) -> None:
        self._loggers = list(loggers)
        self._silent = silent
        self._dropped: set[str] = set()
        self._reported: set[tuple[str, ...]] = set()

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

    def log_media(self, media: Media, step: int) -> None:
        """Give an image, a text, a histogram or audio to the loggers that take it.

        Warns once for each kind, where a service does not take it or no logger does.
        """
        if not self._loggers:
            return
        takers = [each for each in self._loggers if media.kind in (each.media or ())]
        missing = [
            type(each).__name__
            for each in self._loggers
            if each not in takers and (not takers or each.media is not None)
        ]
        report = (media.kind, *missing)
        if missing and report not in self._reported:
            self._reported.add(report)
            warnings.warn(
                f"{', '.join(missing)} takes no {media.kind}: {media.name!r} is not logged there. "
                "TensorBoardLogger and the loggers to services do",
                LoopkitWarning,
                stacklevel=3,
            )
        if takers:
            converted = media.converted()
            self._each("log_media", lambda logger: logger.log_media(converted, step), takers)

    def named(self, name: str) -> Any:
        """Return the logger called ``name``, such as "tensorboard" or the name of its class.

        On a rank that does not log, and for a logger that has failed, it is an object whose every
        attribute and call is itself, so that code for it does nothing.

        Raises:
            OptionError: there is none.
        """
        found = {part: each for each in self._loggers for part in _names(each)}
        if name in found:
            return found[name]
        if self._silent or name in self._dropped:
            return Silent()
        raise OptionError(
            f"run.logger({name!r}): this run has {', '.join(found) or 'no loggers'}."
            f"{nearest(name, found)}"
        )

    def flush(self) -> None:
        """Flush all loggers."""
        self._each("flush", lambda logger: logger.flush())

    def files(self) -> tuple[Path, ...]:
        """Write everything that is buffered, and return the files that hold what was logged."""
        found: list[Path] = []
        self.flush()
        self._each("files", lambda logger: found.extend(logger.files()))
        return tuple(found)

    def close(self, status: str = "finished") -> None:
        """Close all loggers, and let them note how the run ended."""
        self._each("end", lambda logger: logger.end(status))
        self._each("close", lambda logger: logger.close())

    def _each(
        self, method: str, call: Callable[[Logger], None], loggers: Iterable[Logger] | None = None
    ) -> None:
        for logger in list(self._loggers if loggers is None else loggers):
            try:
                call(logger)
            except Exception as error:
                self._loggers.remove(logger)
                self._dropped.update(_names(logger))
                warnings.warn(
                    f"the logger {type(logger).__name__} failed in {method} and is left out from "
                    f"now on: {type(error).__name__}: {error}",
                    LoopkitWarning,
                    stacklevel=3,
                )


class Silent:
    """Does nothing: each attribute and each call is the object itself."""

    def __getattr__(self, name: str) -> Silent:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *arguments: Any, **keywords: Any) -> Silent:
        """Return the object itself."""
        return self


def _names(logger: Logger) -> list[str]:
    """Return the names of a logger for ``run.logger``."""
    return [name for name in (logger.name, type(logger).__name__) if name]
