"""Cadences of hooks that act at certain steps."""

from __future__ import annotations

from loopkit.checks import shown
from loopkit.durations import Cadence, Duration, RunLength
from loopkit.errors import OptionError


def cadence_in_steps(duration: Duration, length: RunLength, option: str) -> Cadence:
    """Return the steps at which a hook acts.

    Raises:
        OptionError: the duration needs data with a length, and the data has none.
    """
    cadence = Cadence(duration, length, option, by_steps=True)
    if not cadence.counts_steps:
        raise OptionError(
            f"{shown(option, str(duration))} needs data with a length: give it in steps"
        )
    return cadence
