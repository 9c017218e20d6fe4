"""Learning-rate schedules: a linear warmup, then a factor of the base rate at each step.

A schedule is a pure function of the number of completed optimizer steps. So it has no state, and is
the same at any accumulation and after any resume. Only ``reduce_on_plateau`` depends on metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
            from the warmup to the end of the run, and ``lengths`` by name.
        warmup: the length of the warmup: steps, ``"10%"`` of the run or ``"1 epoch"``; 0 for none.
        needs_total: whether the shape depends on the end of the run.
        lengths: further lengths for ``shape``, which gets them in whole steps.
        start: the factor at the start of the warmup.
    """

    name: str
    shape: Shape
    warmup: object = 0
    needs_total: bool = True
    lengths: Mapping[str, object] = field(default_factory=dict)
    start: float = 0.0

    def __post_init__(self) -> None:
        for name, value in {"warmup": self.warmup, **self.lengths}.items():
            _length(value, f"{self.name}({name}=)")

    def resolve(self, length: RunLength) -> Callable[[int], float]:
        """Return the factor as a function of the completed steps, for a run of this length.

        Raises:
            OptionError: the shape needs the end of the run, which is not known, or a length is a
                time.
        """
        if self.needs_total and length.steps is None:
            raise OptionError(
                f"the schedule {self.name!r} needs to know where the run ends: "
                "give Fit(steps=...), or data with a length"
            )
        warmup = in_steps(self.warmup, length, f"{self.name}(warmup=)")
        lengths = {
            name: in_steps(value, length, f"{self.name}({name}=)")
            for name, value in self.lengths.items()
        }
        total = max(1, (length.steps or 0) - warmup)
        shape = self.shape
        start = self.start

        def factor(step: int) -> float:
            if step < warmup:
                return start + (1.0 - start) * step / warmup
            return shape(step - warmup, total, **lengths)

        return factor

    def depends_on_total(self) -> bool:
        """Return whether the schedule changes with the length of the run."""
        lengths = [_length(value, self.name) for value in (self.warmup, *self.lengths.values())]
        return self.needs_total or any(
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
            return _between(start, 1.0, step / peak)
        return _between(1.0, end, min(1.0, (step - peak) / max(1e-9, total - 1.0 - peak)))

    return Schedule("one_cycle", shape)


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
