"""Non-finite losses and gradients: found without waiting for the device, kept from the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

ON_NAN = ("raise", "skip", "ignore")


def propagate_nonfinite(loss: Tensor) -> Tensor:
    """Return ``loss`` bit for bit, with NaN gradients if the loss is not finite.

    An infinite loss can have finite gradients. Then only its own rank would skip the step; NaN
    gradients reach all ranks.
    """
    value = loss.detach()
    return loss * (1 + (value - value))


class NonFiniteGuard:
    """A flag that is up while an update would use a value that is not finite.

    On a CPU the host sees the memory of the flag, so a non-finite step is known before its update.
    On an accelerator the host reads nothing. Fused optimizers take the flag as ``found_inf``, as
    they do from torch's GradScaler, and change nothing while it is 1. An optimizer that does not
    take the flag needs one read per step instead.

    Under "raise" the flag stays up, and nothing changes, until the host reads the count of such
    steps at a log or save. Under "skip" ``finish_step`` lowers the flag.

    Args:
        mode: "raise" or "skip".
        device: the device of the flag and of all tensors that are checked.
        optimizers: the optimizers that are to take the flag.
        uniform: whether all tensors that are checked have one dtype.
        spans_ranks: whether several ranks train together and must leave out the same steps.

    Attributes:
        check: raises the flag if any element of a list of floating tensors is not finite. The
            tensors do not change.
        blocks_update: true where the host must leave the update out. On a CPU it is the flag
            itself. On an accelerator it is False, or the flag if an optimizer does not take it.
        host_flag: the flag in memory of the host; None on an accelerator.
        losses: the losses of this step, which are checked with its gradients. Several ranks
            propagate them through their gradients instead, so that all ranks see them.
    """

    def __init__(
        self,
        mode: str,
        device: torch.device,
        optimizers: Iterable[Optimizer],
        *,
        uniform: bool,
        spans_ranks: bool,
    ) -> None:
        self.spans_ranks = spans_ranks
        self.losses: list[Tensor] = []
        self.host_flag = np.zeros((), dtype=np.float32) if device.type == "cpu" else None
        self._sticky = mode == "raise"
        if self.host_flag is not None:
            self._flag = torch.from_numpy(self.host_flag)
            self.blocks_update: Any = self.host_flag
        else:
            self._flag = torch.zeros((), dtype=torch.float32, device=device)
            self.blocks_update = False
            for optimizer in optimizers:
                self._hand_flag_to(optimizer)
        # One pass without a read. Multiplying by one leaves every value as it is, bit for bit.
        self._check_one_dtype = partial(
            torch._amp_foreach_non_finite_check_and_unscale_,
            found_inf=self._flag,
            inv_scale=torch.ones((), dtype=torch.float32, device=device),
        )
        self.check: Callable[[list[Tensor]], object] = (
            self._check_one_dtype if uniform else self._check_each_dtype
        )
        self._nonfinite_steps = torch.zeros((), device=self._flag.device)

    def _hand_flag_to(self, optimizer: Any) -> None:
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = self._flag
            optimizer.grad_scale = None
        else:
            self.blocks_update = self._flag

    def _check_each_dtype(self, tensors: list[Tensor]) -> None:
        by_kind: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.is_complex():
                tensor = torch.view_as_real(tensor)
            by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
        for group in by_kind.values():
            self._check_one_dtype(group)

    def raise_if(self, found: bool) -> None:
        """Raise the flag if the host has found a value that is not finite."""
        if found:
            self._flag.fill_(1.0)

    def sync(self) -> None:
        """Raise the flag on all ranks if it is up on any; collective, waits for no device."""
        dist.all_reduce(self._flag.view(1), op=dist.ReduceOp.MAX)

    def finish_step(self) -> bool:
        """Count the step if the flag is up; return whether the host knows that it is."""
        if self.host_flag is not None and not self.host_flag:
            return False
        self._nonfinite_steps += self._flag
        if not self._sticky:
            self._flag.zero_()
        return self.host_flag is not None

    def nan_while_raised(self, loss: Tensor) -> Tensor:
        """Return ``loss`` while the flag is down, NaN with NaN gradients while it is up.

        A loss scaler does not pass the flag to the optimizer, but skips a step with NaN gradients.
        """
        return loss * torch.where(self._flag > 0, torch.nan, 1.0)

    def pop_nonfinite_steps(self) -> int:
        """Return how many steps were counted since the last call; reads the device."""
        count = int(self._nonfinite_steps)
        if count:
            self._nonfinite_steps.zero_()
            self._flag.zero_()
        return count
