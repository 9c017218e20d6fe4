"""Learning-rate schedules: a factor of the base rate as a function of (step, total), after a linear
warmup.

Every one is a pure function of the number of completed optimizer steps, so it needs no state and is
the same at any accumulation and after any resume. Only ``reduce_on_plateau`` reacts to what is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from loopkit.durations import Duration, RunLength
from loopkit.errors import OptionError, nearest
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
    """A warmup to 1, then a shape: ``Schedule("halving", lambda step, total: 0.5 ** (step //
    1000))``.

    Attributes:
        name: for messages and configs.
        shape: (steps since warmup, steps from warmup to the end, and the lengths by name) to a
            factor of the base rate.
        warmup: the length of the linear warmup: steps, ``"10%"`` of the run or ``"1 epoch"``; 0 for
            none.
        needs_total: whether the shape depends on where the run ends.
        lengths: further lengths that the shape takes, handed to it in whole steps.
        start: the factor that the warmup begins at.
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
        """The factor as a function of the number of completed steps, for a run of this length.

        Raises:
            OptionError: the shape needs a total that the length does not have, or a length is given
                in time.
        """
        if self.needs_total and length.steps is None:
            raise OptionError(
                f"the schedule {self.name!r} needs to know where the run ends: "
                "give Fit(steps=...), or data with a length"
            )
        warmup = in_steps(self.warmup, length, f"{self.name}(warmup=)")
        lengths = {
            k: in_steps(value, length, f"{self.name}({k}=)") for k, value in self.lengths.items()
        }
        total, shape, start = max(1, (length.steps or 0) - warmup), self.shape, self.start

        def factor(step: int) -> float:
            return (
                start + (1.0 - start) * step / warmup
                if step < warmup
                else shape(step - warmup, total, **lengths)
            )

        return factor

    def depends_on_total(self) -> bool:
        """Whether another length of the run makes another schedule of it."""
        lengths = [_length(value, self.name) for value in (self.warmup, *self.lengths.values())]
        return self.needs_total or any(
            length is not None and length.unit == "percent" for length in lengths
        )


@dataclass(frozen=True)
class Plateau:
    """See ``reduce_on_plateau``."""

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
        if not 0 < self.factor < 1:
            raise OptionError(
                f"reduce_on_plateau(factor={self.factor!r}): give a number between 0 and 1"
            )
        for name in ("patience", "cooldown"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise OptionError(
                    f"reduce_on_plateau({name}={value!r}): give a whole number of at least 0"
                )

    def monitor(self) -> Monitor:
        """Return the metric, parsed."""
        return Monitor.parse(self.metric, "reduce_on_plateau(metric=)")


@checks_keywords
def constant(warmup: object = 0) -> Schedule:
    """The base rate throughout, after a linear warmup (steps, ``"10%"`` or ``"1 epoch"``)."""
    return Schedule("constant", lambda step, total: 1.0, warmup, needs_total=False)


@checks_keywords
def linear(warmup: object = 0, floor: float = 0.0) -> Schedule:
    """Linearly from the base rate to ``floor`` times it at the end of the run, after a linear
    warmup.
    """
    return polynomial(warmup, 1.0, floor, name="linear")


@checks_keywords
def cosine(warmup: object = 0, floor: float = 0.0, cycles: float = 0.5) -> Schedule:
    """Along a cosine from the base rate to ``floor`` times it (Loshchilov and Hutter 2017), after a
    linear warmup.

    Args:
        warmup: steps, ``"10%"`` of the run or ``"1 epoch"``.
        floor: the lowest factor.
        cycles: periods of the cosine within the run; the half of one ends at its lowest point.
    """

    def wave(step: int, total: int) -> float:
        return 0.5 * (1.0 + math.cos(math.pi * cycles * 2.0 * step / total))

    return Schedule("cosine", _above("cosine", floor, wave), warmup)


@checks_keywords
def cosine_restarts(warmup: object = 0, cycles: int = 1, floor: float = 0.0) -> Schedule:
    """``cycles`` half cosines of equal length within the run, each from the base rate anew."""
    _at_least("cosine_restarts(cycles=", cycles, 1)

    def wave(step: int, total: int) -> float:
        return (
            0.5 * (1.0 + math.cos(math.pi * (cycles * step / total % 1.0))) if step < total else 0.0
        )

    return Schedule("cosine_restarts", _above("cosine_restarts", floor, wave), warmup)


@checks_keywords
def polynomial(
    warmup: object = 0, power: float = 1.0, floor: float = 0.0, *, name: str = "polynomial"
) -> Schedule:
    """From the base rate to ``floor`` times it, along (the share of the run that is left) to the
    ``power``.
    """
    _at_least(f"{name}(power=", power, 0)

    def slope(step: int, total: int) -> float:
        return float(max(0.0, (total - step) / total) ** power)

    return Schedule(name, _above(name, floor, slope), warmup)


@checks_keywords
def inverse_sqrt(warmup: object = 0, timescale: object = None) -> Schedule:
    """Falling as 1 / sqrt(step), for runs without a known end (Vaswani et al. 2017; with timescale,
    Zhai et al. 2022).

    Args:
        timescale: steps in which the factor falls from 1 to 1 / sqrt(2); None takes the warmup, or
            10000 steps.
    """

    def slope(step: int, total: int, timescale: int) -> float:
        return 1.0 / math.sqrt((step + timescale) / timescale)

    lengths = {"timescale": timescale or warmup or 10_000}
    return Schedule("inverse_sqrt", slope, warmup, needs_total=False, lengths=lengths)


@checks_keywords
def wsd(
    warmup: object = 0, decay: object = "10%", shape: str = "cosine", floor: float = 0.0
) -> Schedule:
    """Warmup, a stable stretch at the base rate, and a decay to ``floor`` times it (Hu et al. 2024,
    MiniCPM).

    Args:
        decay: how long before the end the decay begins: steps, ``"10%"`` of the run or ``"1
            epoch"``.
        shape: of the decay: "cosine", "linear" or "1-sqrt".
        floor: the factor that the decay ends at, and the warmup begins at.

    Raises:
        OptionError: another shape.
    """
    if shape not in _DECAYS:
        raise OptionError(
            f"wsd(shape={shape!r}): give one of {', '.join(_DECAYS)}.{nearest(str(shape), _DECAYS)}"
        )

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
    """Half cosines from the base rate to ``floor`` times it, without regard to where the run ends
    (SGDR).

    Loshchilov and Hutter 2017. torch's ``CosineAnnealingWarmRestarts`` has its lowest rate as
    ``eta_min``: here that is ``floor=eta_min / lr``.

    Args:
        T_0: the length of the first: steps, ``"10%"`` of the run or ``"1 epoch"``.
        T_mult: how many times as long as the one before each further one is.
    """
    _at_least("warm_restarts(T_mult=", T_mult, 1)

    def wave(step: int, total: int, T_0: int) -> float:
        if T_mult == 1:
            return 0.5 * (1.0 + math.cos(math.pi * (step % T_0) / T_0))
        at, period = float(step), float(T_0)
        while at >= period:
            at, period = at - period, period * T_mult
        return 0.5 * (1.0 + math.cos(math.pi * at / period))

    shape = _above("warm_restarts", floor, wave)
    return Schedule("warm_restarts", shape, warmup, needs_total=False, lengths={"T_0": T_0})


@checks_keywords
def one_cycle(pct_start: float = 0.3, start: float = 1 / 25, end: float = 1 / 250_000) -> Schedule:
    """Up along a cosine to the base rate, then down (Smith and Topin 2018); torch's ``OneCycleLR``
    without momentum.

    Args:
        pct_start: the share of the run that rises.
        start: the first factor.
        end: the last factor.
    """
    if not 0 < pct_start < 1:
        raise OptionError(
            f"one_cycle(pct_start={pct_start!r}): give a share of the run between 0 and 1"
        )

    def shape(step: int, total: int) -> float:
        peak, last = pct_start * total - 1.0, total - 1.0
        if step <= peak:
            return _between(start, 1.0, step / peak)
        return _between(1.0, end, min(1.0, (step - peak) / max(1e-9, last - peak)))

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
    """Lower the rate when a metric stops getting better: after each evaluation, as torch's
    ``ReduceLROnPlateau``.

    Args:
        metric: its full name and its mode, as ``"eval/loss:min"``.
        factor: what the rate is multiplied by.
        patience: evaluations without an improvement that are let pass.
        threshold: how much better than the best, relative to it, counts as an improvement.
        cooldown: evaluations after a reduction that are not counted.
        floor: the lowest factor of the base rate.
        warmup: of the first steps, linear from 0.
    """
    return Plateau(metric, factor, patience, threshold, cooldown, floor, warmup)


def in_steps(value: object, length: RunLength, option: str) -> int:
    """A length in whole optimizer steps, rounded up; 0 for none.

    Raises:
        OptionError: it is given in time, or needs a length that the run does not have.
    """
    given = _length(value, option)
    if given is None:
        return 0
    period = given.in_steps(length, option)
    if period is None:
        raise OptionError(
            f"{option[:-1]}'{given}'): give steps, epochs of data with a length, or percent, not "
            f"time"
        )
    return math.ceil(period)


def _length(value: object, option: str) -> Duration | None:
    length = None if value in (0, None) else Duration.parse(value, option)
    return None if length is not None and length.unit == "never" else length


def _above(name: str, floor: float, shape: Shape) -> Shape:
    """``shape``, which falls from 1 to 0, made to fall to ``floor``."""
    if not isinstance(floor, (int, float)) or not 0 <= floor <= 1:
        raise OptionError(f"{name}(floor={floor!r}): give a factor of the base rate, from 0 to 1")
    return lambda step, total, **lengths: (
        floor + (1 - floor) * max(0.0, shape(step, total, **lengths))
    )


def _between(start: float, end: float, part: float) -> float:
    return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * part))


def _at_least(what: str, value: float, least: float) -> None:
    if not isinstance(value, (int, float)) or not value >= least:
        raise OptionError(f"{what}{value!r}): give a number of at least {least}")
