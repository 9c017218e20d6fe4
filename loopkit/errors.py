"""Every error loopkit raises on purpose: one family, each with what, where and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoopkitError(Exception):
    """Base of the family. ``exit_code`` is what the command line ends with."""

    exit_code = 1


class LoopkitWarning(UserWarning):
    """Base of what loopkit warns about."""


class OptionError(LoopkitError, ValueError):
    """An option, an argument or a value that is not accepted."""

    exit_code = 2


class TaskError(LoopkitError):
    """A Task that lacks a method, or whose method returned what cannot be used."""


class DataError(LoopkitError):
    """Data that cannot be trained or evaluated on: empty, unsized where a size is needed, a dead
    worker.
    """


class MetricError(LoopkitError):
    """A metric that is not known, or whose inputs the step did not return."""


class NotFiniteError(LoopkitError, ArithmeticError):
    """A loss or a gradient that is NaN or infinite. The parameters are as they were before that
    step.
    """


class MissingExtraError(LoopkitError, ImportError):
    """An optional package that is not installed; the message carries the command that installs it."""


class CheckpointError(LoopkitError):
    """A checkpoint that cannot be used, or does not fit what it is loaded into."""


class CorruptCheckpointError(CheckpointError):
    """Files that do not match their manifest. Nothing was loaded."""


class NoGoodCheckpointError(CheckpointError):
    """Checkpoints exist and none of them can be trusted."""

    exit_code = 65


class RunDirError(LoopkitError):
    """A run directory that cannot be written, or that another run uses."""

    exit_code = 73


class DiskFullError(LoopkitError, OSError):
    """No room for what had to be written. What was saved before is intact."""

    exit_code = 74


class HungError(LoopkitError, TimeoutError):
    """Something that should have answered within its time limit did not."""

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
    """The one-line error for an optional package: what wanted it, and the command that installs it."""
    return MissingExtraError(f"{use} needs the package {package!r}: pip install 'loopkit[{extra}]'")
