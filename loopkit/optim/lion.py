"""Lion as a torch optimizer: the update is the sign of a momentum, with one moment a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from loopkit.sharded import local_tensors


class LionOptimizer(Optimizer):
    """EvoLved Sign Momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    Every element moves by ``lr`` in each step. So rates are 3 to 10 times lower than those of
    AdamW, and weight decay is as many times higher. The state is half the size of Adam's.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: the learning rate.
        betas: the momentum in the update, and the decay of the moment.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a rate, decay or beta is out of range.
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
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Any], group: dict[str, Any]) -> None:
        for p in params:
            if "exp_avg" not in self.state[p]:
                zeros = torch.zeros_like(p, memory_format=torch.preserve_format)
                self.state[p]["exp_avg"] = zeros
        # This rank's part is enough: the update of an element needs no other element.
        moments = local_tensors(self.state[p]["exp_avg"] for p in params)
        grads = local_tensors(p.grad for p in params)
        params = local_tensors(params)
        lr = group["lr"]
        beta1, beta2 = group["betas"]
        updates = torch._foreach_mul(moments, beta1)
        torch._foreach_add_(updates, grads, alpha=1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-lr)
        torch._foreach_mul_(moments, beta2)
        torch._foreach_add_(moments, grads, alpha=1 - beta2)
