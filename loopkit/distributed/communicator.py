"""World: the processes that train together, and the few things they say to each other off the hot
path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from loopkit.errors import LoopkitError

T = TypeVar("T")


class Communicator:
    """Those who train together. Alone by default: then every method does what one process would.

    All methods but the attributes are collective: every rank calls them, in the same order, from
    its main thread. They go over the CPU (gloo) and never touch the device.

    Attributes:
        rank, size: this one's number, and how many there are.
        counts: whether what this process has is added up; not where another one has the same.
    """

    rank = 0
    size = 1
    is_group_leader = True

    def all_gather_object(self, value: T) -> list[T]:
        """Everyone's ``value``, in the order of ranks."""
        return [value]

    def gather_object(self, value: T) -> list[T]:
        """Everyone's ``value``, in the order of ranks, on the first rank; nothing on the others."""
        return [value]

    def broadcast_object(self, value: T) -> T:
        """The first rank's ``value``."""
        return value

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or raises, on the first rank, which alone calls it."""
        return function()

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, called on all; whichever raises, all do."""
        return function()

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sums of everyone's numbers; whole numbers up to 2**53 are exact."""
        return list(numbers)

    def new_group(self) -> Communicator:
        """The same ranks, to be talked to from another thread, until it is left."""
        return self

    def destroy(self) -> None:
        """Give back what ``beside`` took; the run's own World stays."""

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of everyone's scalar tensor, on its device, without waiting for it."""
        return tensor


class Group(Communicator):
    """A World over a process group of torch.distributed, the default one unless another is given."""

    def __init__(self, group: Any = None) -> None:
        self._group = group
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def all_gather_object(self, value: T) -> list[T]:
        """Everyone's ``value``, in the order of ranks."""
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self._group)
        return everyone

    def gather_object(self, value: T) -> list[T]:
        """Everyone's ``value``, in the order of ranks, on the first rank; nothing on the others."""
        everyone: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, everyone, dst=0, group=self._group)
        return everyone or []

    def broadcast_object(self, value: T) -> T:
        """The first rank's ``value``."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, or raises, on the first rank, which alone calls it."""
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (function(), None)
            except (
                LoopkitError,
                OSError,
            ) as error:  # what everyone is to hear of; others are this rank's own
                outcome = (None, error)
        result, failure = self.broadcast_object(outcome)
        if failure is not None:
            raise failure
        return result  # type: ignore[no-any-return]

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on the first rank, called on all; whichever raises, all do."""
        result: Any = None
        failure: BaseException | None = None
        try:
            result = function()
        except (LoopkitError, OSError) as error:
            failure = error
        gathered = self.all_gather_object((result, failure))
        for _, met in gathered:
            if met is not None:
                raise met
        first: T = gathered[0][0]
        return first

    def new_group(self) -> Communicator:
        """The same ranks, to be talked to from another thread, until it is left."""
        return Group(dist.new_group(backend="gloo"))

    def destroy(self) -> None:
        """Give back what ``beside`` took; the run's own World stays."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sums of everyone's numbers; whole numbers up to 2**53 are exact."""
        word = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(word, group=self._group)
        sums: list[float] = word.tolist()
        return sums

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of everyone's scalar tensor, on its device, without waiting for it."""
        total = tensor.detach().clone().reshape(1)
        dist.all_reduce(total, group=self._group)
        return total.reshape(())
