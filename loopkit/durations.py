"""Lengths of a run and cadences within it: "500 steps", "1 epoch", "10%", "30 min", "never"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from loopkit.checks import shown
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
    """The length of a run, as far as it is known.

    Epochs are counted as passes over the data. ``steps`` is an expectation where it follows from
    epochs: a pass may have another number of steps than the length of the data says, and a resumed
    run may have taken its first steps with another batch size.

    Attributes:
        steps_per_epoch: optimizer steps in one epoch; None for data without a length.
        steps: the expected last optimizer step; None where neither the options nor the data tell.
        epochs: passes over the data; None without such a limit.
        seconds: the time limit; None without one.
        max_steps: the limit of optimizer steps that the user gave; None without one.
        offset: how many more steps were taken so far than ``steps_per_epoch`` says.
        epoch: completed passes over the data. Lengths that differ in it alone are equal.
    """

    steps_per_epoch: int | None = None
    steps: int | None = None
    epochs: float | None = None
    seconds: float | None = None
    max_steps: int | None = None
    offset: int = 0
    epoch: int = field(default=0, compare=False)

    def whole_epochs(self) -> int | None:
        """Return the passes of the whole run, the last one perhaps cut; None if not known."""
        found = [] if self.epochs is None else [math.ceil(self.epochs)]
        if self.steps is not None and self.steps_per_epoch:
            found.append(math.ceil((self.steps - self.offset) / self.steps_per_epoch))
        return min(found) if found else None

    def finished(self, epoch: int, step: int) -> bool:
        """Return whether a run with this many completed passes and steps is at its end."""
        if self.max_steps is not None and step >= self.max_steps:
            return True
        if self.epochs is None:
            return False
        if epoch >= self.epochs:
            return True
        # A fraction of a pass is counted in steps.
        last = epoch == math.floor(self.epochs)
        return last and self.steps is not None and step >= self.steps


@dataclass(frozen=True)
class Duration:
    """An amount of training in one unit. ``parse`` reads what ``str()`` returns."""

    amount: Fraction
    unit: Unit

    @classmethod
    def parse(cls, value: object, option: str, *, by_clock: bool = True) -> Duration:
        """Read what a user gave for ``option``.

        Args:
            option: the option as the user writes it: "eval_every" or "EMA(every=)".
            by_clock: whether a length of time and "never" are accepted.

        Raises:
            OptionError: the value has none of the accepted forms, or is not positive.
        """
        parsed = value if isinstance(value, Duration) else cls._read(value)
        if parsed is None:
            raise OptionError(f"{shown(option, value)} is not a duration: give {_FORMS}")
        if not by_clock and parsed.unit in ("second", "never"):
            given = shown(option, str(value))
            raise OptionError(f"{given}: give steps, epochs or a percentage of the run")
        return parsed

    @classmethod
    def _read(cls, value: object) -> Duration | None:
        if isinstance(value, int) and not isinstance(value, bool):
            value = f"{value} steps"
        if not isinstance(value, str):
            return None
        text = value.strip().lower()
        if text == "never":
            return cls(Fraction(0), "never")
        if text.isdecimal():
            text = f"{text} steps"
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+|%)", text)
        if match is None or match[2] not in _UNITS:
            return None
        unit, factor = _UNITS[match[2]]
        amount = Fraction(match[1]) * factor
        whole = unit != "step" or amount.denominator == 1
        return cls(amount, unit) if amount > 0 and whole else None

    def __str__(self) -> str:
        """Return the canonical form, for configs and messages."""
        if self.unit == "never":
            return "never"
        amount = int(self.amount) if self.amount.denominator == 1 else float(self.amount)
        if self.unit == "percent":
            return f"{amount}%"
        return f"{amount} {self.unit}{'s' if amount != 1 else ''}"

    def in_steps(self, length: RunLength, option: str) -> Fraction | None:
        """Return the duration in optimizer steps; None for a time and for "never".

        An epoch of data without a length is None too, if the number of epochs is whole.

        Raises:
            OptionError: the unit needs the length of the epoch or of the run, which is not known.
        """
        if self.unit == "step":
            return self.amount
        given = shown(option, str(self))
        if self.unit == "epoch":
            if length.steps_per_epoch is not None:
                return self.amount * length.steps_per_epoch
            if self.amount.denominator != 1:
                raise OptionError(
                    f"{given} needs data with a length: give it in steps, or give limit_train"
                )
        if self.unit == "percent":
            if length.steps is None:
                raise OptionError(
                    f"{given} needs a run of known length: give steps=, or data with a length"
                )
            return self.amount * length.steps / 100
        return None


@dataclass(frozen=True)
class Start:
    """A point of training before which a cadence is not due: a step, an epoch or a time."""

    step: int = 0
    epoch: int = 0
    seconds: float = 0.0

    @classmethod
    def parse(cls, value: object, option: str, length: RunLength, every: Duration) -> Start:
        """Read what a user gave for ``option``.

        A point beyond the last step becomes the last step, where that is known.

        Args:
            every: the cadence that starts at this point.

        Raises:
            OptionError: the value is no duration, or its point in the run is not known.
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
    """When a repeated action is next due. Only a cadence in time has state: when it was last due.

    Attributes:
        every: how often the action is due.
        length: the length of the run.
        option: the option that gave the cadence, for messages.
        last_seconds: seconds of training at which a cadence in time was last due.
        start: the point of training before which the action is not due.
        by_steps: count whole epochs in steps, too, for a listener that is called before the end of
            an epoch is known.
    """

    every: Duration
    length: RunLength
    option: str
    last_seconds: float = 0.0
    start: Start = Start()
    by_steps: bool = False

    def __post_init__(self) -> None:
        self._period = self._steps()

    @property
    def counts_steps(self) -> bool:
        """Whether the steps at which it is due are known."""
        return self._period is not None

    @property
    def next_seconds(self) -> float | None:
        """Seconds of training after which a cadence in time is next due; None for the others."""
        return self.last_seconds + self.every.amount if self.every.unit == "second" else None

    def next_step(self, step: int) -> int | None:
        """Return the first step after ``step`` at which it is due; None where no step is.

        A cadence in time may be due at any step: for it, that is the very next step.
        """
        if self._period is None:
            return step + 1 if self.every.unit == "second" else None
        step = max(step, self.start.step - 1)
        if self._period <= 1:
            return step + 1
        # Parts of epochs are counted as if all passes so far had the steps of this one.
        offset = self.length.offset if self.every.unit == "epoch" else 0
        step -= offset
        count = math.floor(step / self._period) + 1
        due = math.ceil(count * self._period)
        return offset + (due if due > step else math.ceil((count + 1) * self._period))

    def set_length(self, length: RunLength) -> None:
        """Follow a change of the length of the run."""
        self.length = length
        self._period = self._steps()

    def _steps(self) -> Fraction | None:
        """Return the period in steps; None for time, for "never", and for whole epochs."""
        whole = self.every.unit == "epoch" and self.every.amount.denominator == 1
        if whole and not self.by_steps:
            return None
        return self.every.in_steps(self.length, self.option)

    def is_due(self, step: int, seconds: float, epoch_ended: int | None) -> bool:
        """Return whether the action is due after a step.

        Args:
            step: the number of completed steps.
            seconds: seconds of training so far.
            epoch_ended: the number of completed epochs if the step closed one, else None.
        """
        started = step >= self.start.step and seconds >= self.start.seconds
        if self._period is not None:
            return started and self.next_step(step - 1) == step
        if self.every.unit == "second":
            if seconds - self.last_seconds < self.every.amount:
                return False
            # The clock runs before the start, too: an action due there is skipped, not postponed.
            self.last_seconds = seconds
            return started
        if self.every.unit != "epoch" or epoch_ended is None or epoch_ended % self.every.amount:
            return False
        return started and epoch_ended >= self.start.epoch


def parse_seconds(value: str | int | float, option: str) -> float:
    """Return the seconds of a length of time above 0.

    Raises:
        OptionError: it is none.
    """
    seconds = 0.0
    if isinstance(value, str):
        duration = Duration.parse(value, option)
        seconds = float(duration.amount) if duration.unit == "second" else 0.0
    elif not isinstance(value, bool):
        seconds = value
    if seconds > 0:
        return seconds
    raise OptionError(
        f"{option}={value!r}: give a length of time above 0, such as '30 min' or seconds"
    )
