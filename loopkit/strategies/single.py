"""SingleDevice: one process on one device, which is a CPU, a CUDA GPU or an Apple GPU."""

from __future__ import annotations

import torch

from loopkit.devices import find_device
from loopkit.distributed.communicator import Communicator
from loopkit.keywords import checks_keywords
from loopkit.strategies.module_strategy import ModuleStrategy


@checks_keywords
class SingleDevice(ModuleStrategy):
    """One device in this process.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".

    Raises:
        OptionError: this machine has no such device.
    """

    def __init__(self, device: str = "auto") -> None:
        self._device = find_device(device)

    def _join_ranks(self) -> tuple[torch.device, Communicator]:
        return self._device, Communicator()
