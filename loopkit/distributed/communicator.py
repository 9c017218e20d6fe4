"""The collectives that ranks use between steps: on objects and numbers, over the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from loopkit.errors import LoopkitError

T = TypeVar("T")


class Communicator:
    """The collectives of one process that runs alone; ProcessGroupCommunicator is over several.

    Every rank must call each method, in the same order, from its main thread. The methods go over
    the CPU (gloo) and never wait for the device.

    Attributes:
        rank: the number of this member.
        size: the number of members.
        is_group_leader: whether the value of this process counts. In a tensor-parallel group all
            ranks have the same value, and only the leader's counts.
    """

    rank: int = 0
    size: int = 1
    is_group_leader: bool = True

    def all_gather_object(self, value: T) -> list[T]:
        """Return the ``value`` of each member, in order, on every rank."""
        return [value]

    def gather_object(self, value: T) -> list[T]:
        """Return the ``value`` of each member, in order, on rank 0; an empty list on the others."""
        return [value]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """Return the ``value`` of member ``source`` on every rank."""
        return value

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call ``function`` on rank 0 alone; every rank returns its result or raises its error."""
        return function()

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """Call ``function`` on every rank and return the result of rank 0.

        If it raises on any rank, every rank raises the first error.
        """
        return function()

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Return the sums of all members' numbers; whole numbers up to 2**53 are exact."""
        return list(numbers)

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of all members' scalar tensors, on their device, without waiting for it."""
        return tensor

    def new_group(self) -> Communicator:
        """Return a communicator over the same ranks that another thread may use."""
        return self

    def destroy(self) -> None:
        """Free what ``new_group`` made; the default process group of the run stays."""


class ProcessGroupCommunicator(Communicator):
    """A Communicator over a process group of torch.distributed.

    Args:
        group: the process group; None takes the default one.
        tp_size: how many consecutive ranks form a tensor-parallel group. Each such group is one
            member, because its ranks train on the same samples.
    """

    def __init__(self, group: Any = None, tp_size: int = 1) -> None:
        self._group = group
        self._tp_size = tp_size
        self._global_rank = dist.get_rank()
        self._world_size = dist.get_world_size()
        self.rank = self._global_rank // tp_size
        self.size = self._world_size // tp_size
        self.is_group_leader = self._global_rank % tp_size == 0

    def all_gather_object(self, value: T) -> list[T]:
        """See ``Communicator``."""
        sent = value if self.is_group_leader else None
        return self._all_gather(sent)[:: self._tp_size]

    def _all_gather(self, value: Any) -> list[Any]:
        gathered: list[Any] = [None] * self._world_size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def gather_object(self, value: T) -> list[T]:
        """See ``Communicator``."""
        gathered: list[Any] | None = [None] * self._world_size if self._global_rank == 0 else None
        sent = value if self.is_group_leader else None
        dist.gather_object(sent, gathered, dst=0, group=self._group)
        return (gathered or [])[:: self._tp_size]

    def broadcast_object(self, value: T, source: int = 0) -> T:
        """See ``Communicator``."""
        box = [value]
        dist.broadcast_object_list(box, src=source * self._tp_size, group=self._group)
        return box[0]

    def run_on_rank_zero(self, function: Callable[[], T]) -> T:
        """See ``Communicator``."""
        outcome: tuple[Any, BaseException | None] = (None, None)
        if self._global_rank == 0:
            outcome = _outcome(function)
        result, error = self.broadcast_object(outcome)
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def run_on_all_ranks(self, function: Callable[[], T]) -> T:
        """See ``Communicator``."""
        outcomes = self._all_gather(_outcome(function))
        for _, error in outcomes:
            if error is not None:
                raise error
        first: T = outcomes[0][0]
        return first

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """See ``Communicator``."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        return self._all_reduce(sums).tolist()

    def all_reduce_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """See ``Communicator``."""
        return self._all_reduce(tensor.detach().clone().reshape(1)).reshape(())

    def _all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.is_group_leader:
            tensor.zero_()
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def new_group(self) -> Communicator:
        """See ``Communicator``."""
        return ProcessGroupCommunicator(dist.new_group(backend="gloo"), self._tp_size)

    def destroy(self) -> None:
        """See ``Communicator``."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)


def _outcome(function: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """Return the result of ``function``, or the error that all ranks are to raise.

    An error of another kind is a fault of this rank alone, which ends the process.
    """
    try:
        return function(), None
    except (LoopkitError, OSError) as error:
        return None, error
