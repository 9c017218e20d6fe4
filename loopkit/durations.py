"""Lengths of a run and cadences within it: ``"500 steps"``, ``"1 epoch"``, ``"10%"``, ``"30 min"``,
``"never"``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from loopkit.errors import OptionError

Unit = Literal["step", "epoch", "percent", "second", "never"]

_UNITS: dict[str, tuple[Unit, int]] = {
    "step": ("step", 1), "steps": ("step", 1),
    "epoch": ("epoch", 1), "epochs": ("epoch", 1),
    "%": ("percent", 1), "percent": ("percent", 1),
    "s": ("second", 1), "sec": ("second", 1), "second": ("second", 1), "seconds": ("second", 1),
    "min": ("second", 60), "minute": ("second", 60), "minutes": ("second", 60),
    "h": ("second", 3600), "hour": ("second", 3600), "hours": ("second", 3600),
    "d": ("second", 86400), "day": ("second", 86400), "days": ("second", 86400),
}  # fmt: skip
_FORMS = "'500 steps', '1 epoch', '10%', '30 min', 'never' or a whole number of steps"


@dataclass(frozen=True)
class RunLength:
    """How long a run is, as far as it is known.

    ``steps_per_epoch`` is None for data without a length; ``steps`` is None when neither the
    options nor the data bound the number of optimizer steps.
    """

    steps_per_epoch: int | None = None
    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Duration:
    """An amount of training in one unit; ``str()`` gives back a form that parses to the same."""

    amount: Fraction
    unit: Unit

    @classmethod
    def parse(cls, value: object, option: str) -> Duration:
        """Read what a user typed for ``option``.

        Raises:
            OptionError: the value has none of the accepted forms, or is not positive.
        """
        if isinstance(value, Duration):
            return value
        if (isinstance(value, int) and not isinstance(value, bool)) or (
            isinstance(value, str) and value.isdecimal()
        ):
            value = f"{value} steps"
        if isinstance(value, str):
            text = value.strip().lower()
            if text == "never":
                return cls(Fraction(0), "never")
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+|%)", text)
            if match and match[2] in _UNITS:
                unit, factor = _UNITS[match[2]]
                amount = Fraction(match[1]) * factor
                if amount > 0 and (unit != "step" or amount.denominator == 1):
                    return cls(amount, unit)
        raise OptionError(f"{option}={value!r} is not a duration: give {_FORMS}")

    def __str__(self) -> str:
        """The canonical form, for configs and messages."""
        if self.unit == "never":
            return "never"
        amount = int(self.amount) if self.amount.denominator == 1 else float(self.amount)
        return (
            f"{amount}%"
            if self.unit == "percent"
            else f"{amount} {self.unit}{'s' if amount != 1 else ''}"
        )

    def in_steps(self, length: RunLength, option: str) -> Fraction | None:
        """The period in optimizer steps; None for time and for ``"never"``.

        Raises:
            OptionError: the unit needs a length of epoch or run that the data and the options do
                not give.
        """
        if self.unit == "step":
            return self.amount
        if self.unit == "epoch":
            if length.steps_per_epoch is not None:
                return self.amount * length.steps_per_epoch
            if self.amount.denominator != 1:
                raise OptionError(
                    f"{option}='{self}' needs data with a length: give it in steps, or give "
                    f"limit_train"
                )
        if self.unit == "percent":
            if length.steps is None:
                raise OptionError(
                    f"{option}='{self}' needs a run of known length: give steps=, or data with a "
                    f"length"
                )
            return self.amount * length.steps / 100
        return None


@dataclass(frozen=True)
class Start:
    """A point of training before which a cadence does nothing: by one of step, epoch and seconds."""

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0

    @classmethod
    def parse(cls, value: object, option: str, length: RunLength, every: Duration) -> Start:
        """Read what a user typed for ``option``, the start of what comes ``every`` so often.

        A point beyond the last step counts as the last step, where that is known.

        Raises:
            OptionError: it is not a duration, or nothing says where in the data or the run that
                point is.
        """
        after = Duration.parse(value, option)
        if after.unit == "never":
            raise OptionError(
                f"{option}='never' names no point of training: give 'never' as the cadence instead"
            )
        if after.unit == "second":
            return cls(seconds=float(after.amount))
        steps = after.in_steps(length, option)
        if steps is not None:
            last = math.inf if length.steps is None else length.steps
            return cls(step=int(min(math.ceil(steps), last)))
        if every.unit != "epoch":
            raise OptionError(
                f"{option}='{after}' needs data with a length where the cadence is not in epochs: "
                "give it in steps, or give limit_train"
            )
        return cls(epoch=int(after.amount))


@dataclass
class Cadence:
    """When something that repeats is next due. Pure in the step; only a time cadence keeps a clock."""

    every: Duration
    length: RunLength
    option: str
    last_seconds: float = 0.0
    start: Start = Start()

    def __post_init__(self) -> None:
        self._period = self.every.in_steps(self.length, self.option)

    @property
    def counts_steps(self) -> bool:
        """Whether it is due at known steps."""
        return self._period is not None

    @property
    def next_seconds(self) -> float | None:
        """After how many seconds of training this is next due; None where no clock tells."""
        return self.last_seconds + self.every.amount if self.every.unit == "second" else None

    def next_step(self, step: int) -> int | None:
        """The first step after ``step`` at which this is due; the very next one where only a clock
        can tell.
        """
        if self._period is None:
            return step + 1 if self.every.unit == "second" else None
        step = max(step, self.start.step - 1)
        if self._period <= 1:
            return step + 1
        count = math.floor(step / self._period) + 1
        due = math.ceil(count * self._period)
        return due if due > step else math.ceil((count + 1) * self._period)

    def is_due(self, step: int, seconds: float, epoch_ended: int | None) -> bool:
        """Whether ``step``, just completed after ``seconds`` of training, is one of the due ones.

        ``epoch_ended`` is the number of epochs completed if the step closed one, else None.
        """
        started = step >= self.start.step and seconds >= self.start.seconds
        if self._period is not None:
            return started and self.next_step(step - 1) == step
        if self.every.unit == "second":
            if seconds - self.last_seconds < self.every.amount:
                return False
            self.last_seconds = (
                seconds  # also before the start: what falls due there is left out, not put off
            )
            return started
        if self.every.unit != "epoch" or epoch_ended is None or epoch_ended % self.every.amount:
            return False
        return started and epoch_ended >= self.start.epoch
