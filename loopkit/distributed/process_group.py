"""What strategies over several processes share: finding a place and a device, starting from the
same weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loopkit.distributed.communicator import Communicator, find_rank_info, join
from loopkit.errors import OptionError
from loopkit.strategies.single import find_device


@dataclass(frozen=True)
class ProcessGroupSetup:
    """How a strategy joins the other processes.

    Attributes:
        accelerator: "auto", "cpu" or "cuda".
        timeout: seconds that a rank waits for the others before it gives up.
        alone: whether a single process needs a process group too.
    """

    accelerator: str
    timeout: float
    alone: bool = False

    def __post_init__(self) -> None:
        if type(self.timeout) not in (int, float) or not self.timeout > 0:
            raise OptionError(f"timeout={self.timeout!r}: give seconds above 0")

    @property
    def local_size(self) -> int:
        """How many processes run on this machine."""
        place = find_rank_info()
        return place.local_size if place else 1

    def __call__(self) -> tuple[torch.device, Communicator]:
        """This rank's device, and those it trains with."""
        place = find_rank_info()
        device = find_device(self.accelerator, place.local_rank if place else None)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if not self.alone and not dist.is_initialized() and (place is None or place.size == 1):
            return device, Communicator()
        return device, join(place, device, self.timeout)


def spread(task: nn.Module, world: Communicator) -> None:
    """Give every rank the first one's parameters and buffers."""
    if world.size > 1:
        with torch.no_grad():
            for tensor in [*task.parameters(), *task.buffers()]:
                dist.broadcast(tensor.detach(), src=0)


def tell(loss: Tensor) -> Tensor:
    """``loss``, bit for bit; but where it is not finite its gradients are not either, so that all
    ranks see it.

    An infinite loss can have finite gradients, and then its rank alone would leave the step out.
    """
    value = loss.detach()
    return loss * (1 + (value - value))
