"""The values that a sweep tries: a list of them, or a range."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loopkit.errors import OptionError


@dataclass(frozen=True)
class Choices:
    """Values to choose from, as they are typed."""

    values: tuple[str, ...]

    def draw(self, generator: random.Random) -> str:
        """Return one of the values."""
        return generator.choice(self.values)

    def suggest(self, name: str, trial: Any) -> str:
        """Return the value that a trial of Optuna takes."""
        return str(trial.suggest_categorical(name, list(self.values)))


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Attributes:
        log: whether all orders of magnitude are equally likely.
        whole: whether the numbers are integers.
    """

    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, generator: random.Random) -> str:
        """Return a number of the range, with four digits."""
        if self.log:
            value = math.exp(generator.uniform(math.log(self.low), math.log(self.high)))
        else:
            value = generator.uniform(self.low, self.high)
        if not self.whole:
            return f"{value:.4g}"
        if not self.log:
            return str(generator.randint(int(self.low), int(self.high)))
        return str(min(int(self.high), max(int(self.low), round(value))))

    def suggest(self, name: str, trial: Any) -> str:
        """Return the value that a trial of Optuna takes."""
        if self.whole:
            return str(trial.suggest_int(name, int(self.low), int(self.high), log=self.log))
        return f"{trial.suggest_float(name, self.low, self.high, log=self.log):.8g}"


Space = Mapping[str, Choices | Range]


def read_space(axes: Mapping[str, list[str]]) -> dict[str, Choices | Range]:
    """Read ``lr=1e-3,3e-3``, ``lr=1e-5..1e-2:log`` and ``layers=2..8``.

    Raises:
        OptionError: a range is not one.
    """
    return {
        name: _range(name, texts[0])
        if len(texts) == 1 and ".." in texts[0]
        else Choices(tuple(texts))
        for name, texts in axes.items()
    }


def _range(name: str, text: str) -> Range:
    numbers, colon, scale = text.partition(":")
    low, _, high = numbers.partition("..")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = math.nan, math.nan
    if not ends[0] < ends[1] or (colon and scale != "log"):
        raise OptionError(f"{name}={text} is no range: give it as {name}=1e-5..1e-2:log, or =2..8")
    if scale == "log" and ends[0] <= 0:
        raise OptionError(f"{name}={text}: a range with :log begins above 0")
    return Range(*ends, scale == "log", low.lstrip("-").isdigit() and high.lstrip("-").isdigit())


def grid(space: Space) -> Iterator[dict[str, str]]:
    """Yield every combination of values.

    Raises:
        OptionError: a range has no list of values.
    """
    for name, values in space.items():
        if isinstance(values, Range):
            raise OptionError(
                f"{name}: a range has no end of values: list some, as in {name}=a,b, or give "
                "--random N or --optuna N"
            )
    lists = [values.values for values in space.values() if isinstance(values, Choices)]
    for chosen in itertools.product(*lists):
        yield dict(zip(space, chosen))


def drawn(space: Space, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield ``count`` random combinations. The first ones are the same for a larger ``count``."""
    for number in range(count):
        generator = random.Random(f"{seed} {number}")
        yield {name: values.draw(generator) for name, values in space.items()}
