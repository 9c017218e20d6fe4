"""Guard: a loss or gradient that is not finite never reaches a parameter, and finding it out waits
for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    """Watches what a step is about to use.

    On a CPU the flag lies in memory that the host sees, and a bad step is known before its update.
    On an
    accelerator nothing is read: fused optimizers take the flag as ``found_inf``, as they do from
    torch's GradScaler, and leave parameters and state untouched where it is 1. Under "raise" it
    stays up once it is up, so nothing moves any more from the first bad step to the moment, at a
    log or save, when the host reads of it. Under "skip" it is lowered after each step. An optimizer
    without such a flag, on an accelerator, needs one read per step instead.

    Args:
        uniform: whether gradients and losses all have one dtype and device.
    """

    def __init__(
        self, mode: str, device: torch.device, optimizers: Iterable[Optimizer], *, uniform: bool
    ) -> None:
        self.sticky = mode == "raise"
        self.uniform = uniform
        self._host = np.zeros((), dtype=np.float32) if device.type == "cpu" else None
        self._found = (
            torch.zeros((), device=device) if self._host is None else torch.from_numpy(self._host)
        )
        self._one = torch.ones((), device=device)
        self._bad_steps: Any = 0 if self._host is not None else torch.zeros((), device=device)
        self._needs_read = False
        if self._host is None:
            for optimizer in optimizers:
                if getattr(optimizer, "_step_supports_amp_scaling", False):
                    optimizer.found_inf = self._found  # type: ignore[attr-defined]
                    optimizer.grad_scale = None  # type: ignore[attr-defined]
                else:
                    self._needs_read = True

    def check(self, tensors: list[Tensor]) -> bool:
        """Raise the flag if any element of these floating tensors is not finite; they are not
        changed.

        Returns:
            Whether the host knows that this step must not update.
        """
        groups = [tensors]
        if not self.uniform:
            by_kind: dict[Any, list[Tensor]] = {}
            for tensor in tensors:
                by_kind.setdefault((tensor.device, tensor.dtype), []).append(tensor)
            groups = list(by_kind.values())
        for group in groups:
            # One pass without a read; multiplying by one leaves every value as it is, bit for bit.
            torch._amp_foreach_non_finite_check_and_unscale_(group, self._found, self._one)
        if self._host is not None:
            return bool(self._host[()])
        return self._needs_read and bool(self._found)

    def agree(self) -> None:
        """Raise the flag where any rank's is up; collective, and without a wait on an accelerator."""
        dist.all_reduce(self._found.view(1), op=dist.ReduceOp.MAX)

    def finish_step(self) -> bool:
        """The step is over: count it if it was bad; returns whether the host knows that it was."""
        if self._host is not None:
            if not self._host[()]:
                return False
            self._bad_steps += 1
        else:
            self._bad_steps.add_(self._found)
        if not self.sticky:
            self._found.zero_()
        return self._host is not None

    def poison(self, loss: Tensor) -> Tensor:
        """``loss`` itself while all is well; NaN, gradients included, once the flag is up.

        With a loss scaler the flag cannot go to the optimizer, but a NaN gradient makes the scaler
        skip.
        """
        return loss * torch.where(self._found > 0, torch.nan, 1.0)

    def pop_nonfinite_steps(self) -> int:
        """How many steps were bad since last asked; reads the device."""
        bad = int(self._bad_steps)
        if bad:
            self._bad_steps = self._bad_steps * 0
            self._found.zero_()
        return bad
