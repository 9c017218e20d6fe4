"""Teams: ranks that hold one model between them, and so train on the same samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from loopkit.distributed.communicator import Communicator

T = TypeVar("T")


class DataParallelView(Communicator):
    """A World as seen by the data: teams of ranks that follow each other are one member each, and
    count once.

    Every rank calls its methods, as those of the World that it is made of.

    Args:
        everyone: all ranks.
        size: ranks in a team; a divisor of how many there are.
    """

    def __init__(self, everyone: Communicator, size: int) -> None:
        self._everyone, self._team = everyone, size
        self.rank, self.size = everyone.rank // size, everyone.size // size
        self.is_group_leader = everyone.rank % size == 0

    def all_gather_object(self, value: T) -> list[T]:
        """Each team's ``value``, in the order of teams."""
        return self._everyone.all_gather_object(value if self.is_group_leader else None)[
            :: self._team
        ]  # type: ignore[return-value]

    def gather_object(self, value: T) -> list[T]:
        """Each team's ``value``, on the first rank; nothing on the others."""
        return self._everyone.gather_object(value if self.is_group_leader else None)[:: self._team]  # type: ignore[return-value]

    def broadcast_object(self, value: T) -> T:
        """The first rank's ``value``."""
        return self._everyone.broadcast_object(value)

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or raises, on the first rank, which alone calls it."""
        return self._everyone.run_on_rank_zero(function)

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, called on all; whichever raises, all do."""
        return self._everyone.run_on_all_ranks(function)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sums of each team's numbers."""
        return self._everyone.all_reduce_sum(
            *(numbers if self.is_group_leader else [0.0] * len(numbers))
        )

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of each team's scalar tensor, on its device, without waiting for it."""
        return self._everyone.all_reduce_tensor(
            tensor if self.is_group_leader else torch.zeros_like(tensor)
        )

    def new_group(self) -> Any:
        """The same teams, to be talked to from another thread, until they are left."""
        return DataParallelView(self._everyone.new_group(), self._team)

    def destroy(self) -> None:
        """Give back what ``beside`` took."""
        self._everyone.destroy()
