"""Teams: ranks that hold one model between them, and so train on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from loopkit.distributed.communicator import World

T = TypeVar("T")


class Teams(World):
    """A World as seen by the data: teams of ranks that follow each other are one member each, and
    count once.

    Every rank calls its methods, as those of the World that it is made of.

    Args:
        everyone: all ranks.
        size: ranks in a team; a divisor of how many there are.
    """

    def __init__(self, everyone: World, size: int) -> None:
        self._everyone, self._team = everyone, size
        self.rank, self.size = everyone.rank // size, everyone.size // size
        self.counts = everyone.rank % size == 0

    def gather(self, value: T) -> list[T]:
        """Each team's ``value``, in the order of teams."""
        return self._everyone.gather(value if self.counts else None)[:: self._team]  # type: ignore[return-value]

    def collect(self, value: T) -> list[T]:
        """Each team's ``value``, on the first rank; nothing on the others."""
        return self._everyone.collect(value if self.counts else None)[:: self._team]  # type: ignore[return-value]

    def share(self, value: T) -> T:
        """The first rank's ``value``."""
        return self._everyone.share(value)

    def first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or raises, on the first rank, which alone calls it."""
        return self._everyone.first(function)

    def every(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, called on all; whichever raises, all do."""
        return self._everyone.every(function)

    def add(self, *numbers: float) -> list[float]:
        """The sums of each team's numbers."""
        return self._everyone.add(*(numbers if self.counts else [0.0] * len(numbers)))

    def add_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of each team's scalar tensor, on its device, without waiting for it."""
        return self._everyone.add_tensor(tensor if self.counts else torch.zeros_like(tensor))

    def beside(self) -> Any:
        """The same teams, to be talked to from another thread, until they are left."""
        return Teams(self._everyone.beside(), self._team)

    def leave(self) -> None:
        """Give back what ``beside`` took."""
        self._everyone.leave()
