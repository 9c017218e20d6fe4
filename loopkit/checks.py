"""Checks of the values that a user gives, with one error text for each kind of value.

An option is named as the user writes it: "steps", "Loader(num_workers=)" or "EarlyStop()".
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

from loopkit.errors import OptionError, nearest

T = TypeVar("T")


def shown(option: str, value: object) -> str:
    """Return an option with its value: "steps=3", "Loader(num_workers=-1)", "EarlyStop('loss')"."""
    if option.endswith(")"):
        return f"{option[:-1]}{value!r})"
    return f"{option}={value!r}"


def checked_int(value: T, option: str, *, at_least: int = 1, or_none: bool = False) -> T:
    """Return ``value`` if it is a whole number of at least ``at_least``.

    Raises:
        OptionError: it is something else; True and False are no numbers.
    """
    if value is None and or_none:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
        return value
    end = ", or None" if or_none else ""
    raise OptionError(f"{shown(option, value)}: give a whole number of at least {at_least}{end}")


def checked_number(
    value: T,
    option: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
    or_none: bool = False,
    what: str = "a number",
) -> T:
    """Return ``value`` if it is an int or a float within the bounds.

    Args:
        what: what the number is, for the message.

    Raises:
        OptionError: it is something else; NaN, True and False are no numbers.
    """
    if value is None and or_none:
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # NaN is on the right side of no bound; where there is none, it is not equal to itself.
        fits = (
            value == value
            and (above is None or value > above)
            and (at_least is None or value >= at_least)
            and (below is None or value < below)
            and (at_most is None or value <= at_most)
        )
        if fits:
            return value
    bounds = {"above": above, "of at least": at_least, "below": below, "of at most": at_most}
    given = [f" {word} {bound:g}" for word, bound in bounds.items() if bound is not None]
    end = ", or None" if or_none else ""
    raise OptionError(f"{shown(option, value)}: give {what}{' and'.join(given)}{end}")


def checked_choice(value: T, option: str, choices: Collection[object]) -> T:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        OptionError: it is another; the error lists the choices and names the nearest.
    """
    if value in choices:
        return value
    hint = nearest(str(value), [choice for choice in choices if isinstance(choice, str)])
    listed = ", ".join(map(repr, choices))
    raise OptionError(f"{shown(option, value)} is not known: give one of {listed}.{hint}")
