"""Learning-rate schedules: a linear warmup, then a factor of the base rate at each step.

A schedule is a pure function of the number of completed optimizer steps, or of completed epochs. So
it has no state, and is the same at any accumulation and after any resume. Only
``reduce_on_plateau`` depends on metrics.
"""

from __future__ import annotations

import dis
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

from loopkit.checks import checked_choice, checked_int, checked_number, shown
from loopkit.durations import Duration, RunLength
from loopkit.errors import OptionError
from loopkit.keywords import checks_keywords
from loopkit.monitor import Monitor

Shape = Callable[..., float]
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: 0.5 * (1.0 + math.cos(math.pi * part)),
    "1-sqrt": lambda part: 1.0 - math.sqrt(part),
}


@dataclass(frozen=True)
class Schedule:
    """A linear warmup to the base rate, then a shape.

    Example::

        Schedule("halving", lambda step, total: 0.5 ** (step // 1000), warmup="1%")

    Attributes:
        name: the name in messages and configs.
        shape: returns the factor of the base rate. It takes the steps since the warmup, the steps
            from the warmup to the end of the run, and ``lengths`` by name. All are epochs instead
            of steps under ``unit="epoch"``.
        warmup: the length of the warmup: steps, ``"10%"`` of the run or ``"1 epoch"``; 0 for none.
        needs_total: whether the shape depends on the end of the run; None finds out whether the
            function reads its second argument.
        lengths: further lengths for ``shape``, which gets them in whole steps.
        start: the factor at the start of the warmup.
        unit: what ``shape`` counts: "step", or "epoch" for completed passes over the data. By
            epochs the rate stays as it is within a pass. A warmup rises with each step anyway.
        from_start: whether ``shape`` counts from the start of the run, also where there is a
            warmup.

    Raises:
        OptionError: a length or the unit is not accepted.
    """

    name: str
    shape: Shape
    warmup: object = 0
    needs_total: bool | None = None
    lengths: Mapping[str, object] = field(default_factory=dict)
    start: float = 0.0
    unit: Literal["step", "epoch"] = "step"
    from_start: bool = False

    def __post_init__(self) -> None:
        checked_choice(self.unit, f"Schedule({self.name!r}, unit=)", ("step", "epoch"))
        if self.needs_total is None:
            object.__setattr__(self, "needs_total", _reads_total(self.shape))
        for name, value in {"warmup": self.warmup, **self.lengths}.items():
            _length(value, f"{self.name}({name}=)")

    def by_epoch(self) -> Schedule:
        """Return this schedule counted in epochs, as torch's schedulers stepped after each epoch.

        Example::

            cosine(warmup="5 epochs").by_epoch()
        """
        return replace(self, unit="epoch")

    def resolve(self, length: RunLength) -> Callable[[int], float]:
        """Return the factor as a function of the completed steps, for a run of this length.

        By epochs, it holds until the next epoch begins: the length says how many are completed.

        Raises:
            OptionError: the shape needs the end of the run, which is not known, or a length is a
                time.
        """
        by_epoch = self.unit == "epoch"
        end = length.whole_epochs() if by_epoch else length.steps
        if self.needs_total and end is None:
            raise OptionError(
                f"the schedule {self.name!r} needs to know where the run ends: "
                f"give Fit({'epochs' if by_epoch else 'steps'}=...), or data with a length"
            )
        warmup = in_steps(self.warmup, length, f"{self.name}(warmup=)")
        count = in_epochs if by_epoch else in_steps
        lengths = {
            name: count(value, length, f"{self.name}({name}=)")
            for name, value in self.lengths.items()
        }
        begin = 0 if self.from_start else warmup
        if by_epoch:
            begin = begin // length.steps_per_epoch if length.steps_per_epoch else 0
        total = max(1, (end or 0) - begin)
        shape, start, epoch = self.shape, self.start, length.epoch

        def factor(step: int) -> float:
            if step < warmup:
                return start + (1.0 - start) * step / warmup
            return shape(max(0, epoch - begin) if by_epoch else step - begin, total, **lengths)

        return factor

    def depends_on_total(self) -> bool:
        """Return whether the schedule changes with the length of the run."""
        lengths = [_length(value, self.name) for value in (self.warmup, *self.lengths.values())]
        return bool(self.needs_total) or any(
            length is not None and length.unit == "percent" for length in lengths
        )


@dataclass(frozen=True)
class Plateau:
    """A schedule that lowers the rate when a metric stops improving; see ``reduce_on_plateau``."""

    metric: str = "eval/loss:min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    floor: float = 0.0
    warmup: object = 0
    name: str = "reduce_on_plateau"

    def __post_init__(self) -> None:
        _length(self.warmup, "reduce_on_plateau(warmup=)")
        self.monitor()
        checked_number(self.factor, "reduce_on_plateau(factor=)", above=0, below=1)
        checked_int(self.patience, "reduce_on_plateau(patience=)", at_least=0)
        checked_int(self.cooldown, "reduce_on_plateau(cooldown=)", at_least=0)

    def monitor(self) -> Monitor:
        """Return the metric, parsed."""
        return Monitor.parse(self.metric, "reduce_on_plateau(metric=)")


@checks_keywords
def constant(warmup: object = 0) -> Schedule:
    """Return the base rate at every step, after a linear warmup.

    Args:
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
    """
    return Schedule("constant", lambda step, total: 1.0, warmup, needs_total=False)


@checks_keywords
def linear(warmup: object = 0, floor: float = 0.0) -> Schedule:
    """Return a linear fall from the base rate to the end of the run, after a linear warmup.

    Args:
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
        floor: the lowest factor of the base rate.
    """
    return polynomial(warmup, 1.0, floor, name="linear")


@checks_keywords
def cosine(warmup: object = 0, floor: float = 0.0, cycles: float = 0.5) -> Schedule:
    """Return a fall along a cosine (Loshchilov and Hutter 2017), after a linear warmup.

    Args:
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
        floor: the lowest factor of the base rate. torch's ``eta_min`` is a rate instead.
        cycles: periods of the cosine within the run; half a period ends at the lowest point.
    """

    def wave(step: int, total: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * step / total))

    return Schedule("cosine", _above("cosine", floor, wave), warmup)


@checks_keywords
def cosine_restarts(warmup: object = 0, cycles: int = 1, floor: float = 0.0) -> Schedule:
    """Return several falls along a cosine, of equal length; each starts at the base rate.

    Args:
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
        cycles: the number of falls within the run.
        floor: the lowest factor of the base rate.
    """
    checked_number(cycles, "cosine_restarts(cycles=)", at_least=1)

    def wave(step: int, total: int) -> float:
        if step >= total:
            return 0.0
        return 0.5 * (1.0 + math.cos(math.pi * (cycles * step / total % 1.0)))

    return Schedule("cosine_restarts", _above("cosine_restarts", floor, wave), warmup)


@checks_keywords
def polynomial(
    warmup: object = 0, power: float = 1.0, floor: float = 0.0, *, name: str = "polynomial"
) -> Schedule:
    """Return a fall along a power of the share of the run that is left, after a linear warmup.

    Args:
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
        power: the exponent; 1 falls linearly.
        floor: the lowest factor of the base rate.
        name: the name in messages and configs.
    """
    checked_number(power, f"{name}(power=)", at_least=0)

    def slope(step: int, total: int) -> float:
        return float(max(0.0, (total - step) / total) ** power)

    return Schedule(name, _above(name, floor, slope), warmup)


@checks_keywords
def inverse_sqrt(warmup: object = 0, timescale: object = None) -> Schedule:
    """Return a fall as 1 / sqrt(step), for runs without a known end (Vaswani et al. 2017).

    Args:
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
        timescale: steps in which the factor falls from 1 to 1 / sqrt(2) (Zhai et al. 2022). None
            takes the warmup, or 10000 steps without one.
    """

    def slope(step: int, total: int, timescale: int) -> float:
        return 1.0 / math.sqrt((step + timescale) / timescale)

    lengths = {"timescale": timescale or warmup or 10_000}
    return Schedule("inverse_sqrt", slope, warmup, needs_total=False, lengths=lengths)


@checks_keywords
def wsd(
    warmup: object = 0, decay: object = "10%", shape: str = "cosine", floor: float = 0.0
) -> Schedule:
    """Return warmup, stable base rate and decay (Hu et al. 2024, MiniCPM).

    Args:
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
        decay: the length of the decay at the end of the run, given like ``warmup``.
        shape: the shape of the decay: "cosine", "linear" or "1-sqrt".
        floor: the factor of the base rate at the start of the warmup and at the end of the decay.

    Raises:
        OptionError: an unknown shape, or a value that is not accepted.
    """
    checked_choice(shape, "wsd(shape=)", tuple(_DECAYS))

    def slope(step: int, total: int, decay: int) -> float:
        decaying = step - (total - decay)
        return 1.0 if decaying < 0 else _DECAYS[shape](min(1.0, decaying / max(1, decay)))

    return Schedule(
        "wsd", _above("wsd", floor, slope), warmup, lengths={"decay": decay}, start=floor
    )


@checks_keywords
def warm_restarts(
    T_0: object, T_mult: float = 1, floor: float = 0.0, warmup: object = 0
) -> Schedule:
    """Return falls along a cosine of given lengths (SGDR, Loshchilov and Hutter 2017).

    This is torch's ``CosineAnnealingWarmRestarts``. torch's ``eta_min`` is ``floor * lr`` here.

    Args:
        T_0: the length of the first fall: steps, ``"10%"`` of the run or ``"1 epoch"``.
        T_mult: the factor from the length of each fall to that of the next.
        floor: the lowest factor of the base rate.
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
    """
    checked_number(T_mult, "warm_restarts(T_mult=)", at_least=1)

    def wave(step: int, total: int, T_0: int) -> float:
        if T_mult == 1:
            return 0.5 * (1.0 + math.cos(math.pi * (step % T_0) / T_0))
        since_restart = float(step)
        period = float(T_0)
        while since_restart >= period:
            since_restart -= period
            period *= T_mult
        return 0.5 * (1.0 + math.cos(math.pi * since_restart / period))

    shape = _above("warm_restarts", floor, wave)
    return Schedule("warm_restarts", shape, warmup, needs_total=False, lengths={"T_0": T_0})


@checks_keywords
def one_cycle(pct_start: float = 0.3, start: float = 1 / 25, end: float = 1 / 250_000) -> Schedule:
    """Return a rise along a cosine to the base rate and a fall (Smith and Topin 2018).

    This is torch's ``OneCycleLR`` without its momentum.

    Args:
        pct_start: the share of the run in which the rate rises.
        start: the first factor of the base rate.
        end: the last factor of the base rate.
    """
    checked_number(pct_start, "one_cycle(pct_start=)", above=0, below=1, what="a share of the run")

    def shape(step: int, total: int) -> float:
        peak = pct_start * total - 1.0
        if step <= peak:
            return _between(start, 1.0, step / peak if peak else 1.0)
        return _between(1.0, end, min(1.0, (step - peak) / max(1e-9, total - 1.0 - peak)))

    return Schedule("one_cycle", shape)


@checks_keywords
def multi_step(milestones: Sequence[object], gamma: float = 0.1, warmup: object = 0) -> Schedule:
    """Return a fall by a factor at each milestone; torch's ``MultiStepLR``.

    Example::

        multi_step(["30 epochs", "60 epochs"])

    Args:
        milestones: points since the start of the run: ``"30 epochs"``, ``"50%"``, or steps.
        gamma: the factor of each fall.
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.

    Raises:
        OptionError: there are no milestones, or one is a time.
    """
    if isinstance(milestones, str) or not isinstance(milestones, Sequence) or not milestones:
        raise OptionError(
            f"multi_step({milestones!r}): give the milestones, as multi_step(['30 epochs', "
            "'60 epochs'])"
        )
    checked_number(gamma, "multi_step(gamma=)", above=0)
    points = {f"milestone_{n}": value for n, value in enumerate(milestones)}

    def shape(count: int, total: int, **points: int) -> float:
        return float(gamma ** sum(count >= point for point in points.values()))

    return _falls("multi_step", shape, warmup, points)


@checks_keywords
def step_decay(step_size: object, gamma: float = 0.1, warmup: object = 0) -> Schedule:
    """Return a fall by a factor at regular intervals.

    This is torch's ``StepLR``, and with ``step_decay("1 epoch", 0.95)`` its ``ExponentialLR``.

    Args:
        step_size: the interval, since the start of the run: ``"30 epochs"``, ``"10%"``, or steps.
        gamma: the factor of each fall.
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
    """
    checked_number(gamma, "step_decay(gamma=)", above=0)

    def shape(count: int, total: int, step_size: int) -> float:
        return float(gamma ** (count // step_size))

    return _falls("step_decay", shape, warmup, {"step_size": step_size})


def _falls(name: str, shape: Shape, warmup: object, lengths: Mapping[str, object]) -> Schedule:
    """Return a schedule that counts epochs if all lengths are whole epochs, and steps otherwise."""
    parsed = [_length(value, f"{name}({part}=)") for part, value in lengths.items()]
    if None in parsed:
        raise OptionError(f"{name}({next(iter(lengths.values()))!r}): give a length above 0")
    whole = all(each and each.unit == "epoch" and each.amount.denominator == 1 for each in parsed)
    return Schedule(
        name,
        shape,
        warmup,
        needs_total=False,
        lengths=lengths,
        unit="epoch" if whole else "step",
        from_start=True,
    )


@checks_keywords
def reduce_on_plateau(
    metric: str = "eval/loss:min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    cooldown: int = 0,
    floor: float = 0.0,
    warmup: object = 0,
) -> Plateau:
    """Return torch's ``ReduceLROnPlateau``: lower the rate when a metric stops improving.

    Args:
        metric: the full name of the metric and its mode, as ``"eval/loss:min"``.
        factor: the factor of each reduction.
        patience: evaluations without an improvement before a reduction.
        threshold: the least improvement that counts, as a fraction of the best value.
        cooldown: evaluations after a reduction that do not count.
        floor: the lowest factor of the base rate.
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
    """
    return Plateau(
        metric=metric,
        factor=factor,
        patience=patience,
        threshold=threshold,
        cooldown=cooldown,
        floor=floor,
        warmup=warmup,
    )


def in_steps(value: object, length: RunLength, option: str) -> int:
    """Return a length in whole optimizer steps, rounded up; 0 for none.

    Raises:
        OptionError: it is a time, or a share of a run or epoch of unknown length.
    """
    given = _length(value, option)
    if given is None:
        return 0
    period = given.in_steps(length, option)
    if period is None:
        raise OptionError(
            f"{shown(option, str(given))}: give steps, epochs of data with a length, or percent, "
            "not a time"
        )
    return math.ceil(period)


def in_epochs(value: object, length: RunLength, option: str) -> int:
    """Return a length in whole epochs, rounded up; 0 for none.

    Raises:
        OptionError: it is a time, or its number of epochs is not known.
    """
    given = _length(value, option)
    if given is None:
        return 0
    epochs, end = given.amount, length.whole_epochs()
    if given.unit == "percent" and end is not None:
        epochs = given.amount * end / 100
    elif given.unit != "epoch":
        steps = in_steps(value, length, option)
        if not length.steps_per_epoch:
            raise OptionError(f"{shown(option, str(given))}: give epochs, or data with a length")
        epochs = Fraction(steps, length.steps_per_epoch)
    return math.ceil(epochs)


def _reads_total(shape: Shape) -> bool:
    """Return whether a function of (step, total) reads ``total``, as far as its code tells."""
    code = getattr(shape, "__code__", None)
    if code is None or code.co_argcount < 2:
        return True
    name = code.co_varnames[1]
    if name in code.co_cellvars:
        return True
    read = (part.argval for part in dis.get_instructions(code) if "LOAD" in part.opname)
    return any(name in each if isinstance(each, tuple) else name == each for each in read)


def _length(value: object, option: str) -> Duration | None:
    length = None if value in (0, None) else Duration.parse(value, option)
    return None if length is not None and length.unit == "never" else length


def _above(name: str, floor: float, shape: Shape) -> Shape:
    """Return ``shape``, which falls from 1 to 0, scaled to fall to ``floor``."""
    checked_number(
        floor, f"{name}(floor=)", at_least=0, at_most=1, what="a factor of the base rate"
    )
    return lambda step, total, **lengths: (
        floor + (1 - floor) * max(0.0, shape(step, total, **lengths))
    )


def _between(start: float, end: float, part: float) -> float:
    """Return the value of a cosine from ``start`` to ``end`` after a part of the way."""
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * part))
