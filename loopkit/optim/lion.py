"""Lion: the sign of an interpolated momentum as the update, with one moment per parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """EvoLved Sign Momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2), half the state of
    Adam.

    Every element moves by ``lr`` in each step, so rates are 3 to 10 times lower than AdamW's, and
    weight decay as much higher.

    Raises:
        ValueError: a rate, decay or beta out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        if lr < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={betas}, weight_decay={weight_decay}: betas are in [0, 1), "
                "the others at least 0"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(
                        p, memory_format=torch.preserve_format
                    )
            moments = [_held(self.state[p]["exp_avg"]) for p in params]
            grads, params = [_held(p.grad) for p in params], [_held(p) for p in params]
            lr, (beta1, beta2) = group["lr"], group["betas"]
            updates = torch._foreach_mul(moments, beta1)
            torch._foreach_add_(updates, grads, alpha=1 - beta1)
            torch._foreach_sign_(updates)
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(params, updates, alpha=-lr)
            torch._foreach_mul_(moments, beta2)
            torch._foreach_add_(moments, grads, alpha=1 - beta2)
        return loss


def _held(tensor: Any) -> Any:
    """What this rank holds of a sharded tensor: every element moves by itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
