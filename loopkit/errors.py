"""The errors that loopkit raises. Each says what is wrong, where, and what to do.

LoopkitError
    OptionError                 an option, argument or value that is not accepted; also a ValueError
    TaskError                   a Task without a method, or a method with an unusable result
    DataError                   data that cannot be read
    MetricError                 a metric or one of its inputs is missing
    NotFiniteError              a loss or gradient is NaN or infinite; also an ArithmeticError
    MissingExtraError           an optional package is not installed; also an ImportError
    CheckpointError             a checkpoint cannot be used, or does not fit
        CorruptCheckpointError
        NoValidCheckpointError
    RunDirError                 a run directory cannot be used
        StorageError            an object store does not answer, or refuses
    DiskFullError               also an OSError
    HungError                   a time limit has passed; also a TimeoutError

Warnings are LoopkitWarnings, which are UserWarnings.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoopkitError(Exception):
    """Base class of loopkit's errors.

    Attributes:
        exit_code: the exit code of the command line.
    """

    exit_code = 1


class LoopkitWarning(UserWarning):
    """Base class of loopkit's warnings."""


class OptionError(LoopkitError, ValueError):
    """An option, an argument or a value is not accepted."""

    exit_code = 2


class TaskError(LoopkitError):
    """A Task lacks a method, or its method returned something that cannot be used."""


class DataError(LoopkitError):
    """Data cannot be read: it is empty, has no length where one is needed, or a worker died."""


class MetricError(LoopkitError):
    """A metric is not known, or an evaluation or a step did not return what a metric needs."""


class NotFiniteError(LoopkitError, ArithmeticError):
    """A loss or a gradient is NaN or infinite. The parameters are those before that step."""


class MissingExtraError(LoopkitError, ImportError):
    """An optional package is not installed. The message has the command that installs it."""


class CheckpointError(LoopkitError):
    """A checkpoint cannot be used, or does not fit the object that it is loaded into."""


class CorruptCheckpointError(CheckpointError):
    """Files of a checkpoint do not match its manifest. Nothing was loaded."""


class NoValidCheckpointError(CheckpointError):
    """There are checkpoints, but none is valid."""

    exit_code = 65


class RunDirError(LoopkitError):
    """A run directory cannot be written, or another run uses it."""

    exit_code = 73


class StorageError(RunDirError):
    """An object store does not answer, or refuses. What was saved in it before is intact."""


class DiskFullError(LoopkitError, OSError):
    """The disk is full. Checkpoints that were saved before are intact."""

    exit_code = 74


class HungError(LoopkitError, TimeoutError):
    """A rank, a worker or a service did not answer within its time limit."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name written most like ``name``, else ""."""
    found = closest(name, known)
    return f" Did you mean {found!r}?" if found is not None else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name written most like ``name``; None if no name is near.

    Only misspellings count as near: a similarity of at least 0.8 (``difflib``), or the same letters
    in another order. Upper and lower case are alike.
    """
    spelled = {each.casefold(): each for each in known}
    typed = name.casefold()
    close = difflib.get_close_matches(typed, spelled, n=1, cutoff=0.8)
    close = close or [each for each in spelled if sorted(each) == sorted(typed)]
    return spelled[close[0]] if close else None


def missing_extra(package: str, extra: str, use: str) -> MissingExtraError:
    """Return the error for an optional package that is not installed.

    Args:
        package: the package that is missing.
        extra: the extra of loopkit that installs it.
        use: what needs the package, as the subject of the message.
    """
    return MissingExtraError(
        f"{use} needs the package {package!r}: pip install 'loopkit-torch[{extra}]'"
    )
