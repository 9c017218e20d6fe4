"""KahanAdamW: AdamW for parameters in bf16, which keeps what rounding takes from each update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class KahanAdamW(Optimizer):
    """AdamW whose updates are summed with compensation (Kahan 1965; for training, Zamirai et al.
    2020).

    A parameter in bf16 has 8 bits of precision and swallows updates smaller than 1/256 of itself.
    Here each update is worked out in fp32, and what the parameter cannot hold is kept beside it and
    added to the next one. The first moment is bf16; the second is fp32, since 0.999 of a bf16
    number rounds to the number itself and would never fall. In all 10 bytes per parameter,
    parameter included, where AdamW with fp32 weights takes 12. A parameter of another dtype needs
    no compensation and is updated in fp32.

    Raises:
        ValueError: a rate, decay or beta out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                f"lr={lr}, betas={betas}, eps={eps}, weight_decay={weight_decay}: "
                "betas are in [0, 1), the others at least 0"
            )
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        state, (beta1, beta2), lr = self.state[parameter], group["betas"], group["lr"]
        low = parameter.dtype in (torch.bfloat16, torch.float16)
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if low:
                state["lost"] = torch.zeros_like(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        grad, value = parameter.grad.float(), parameter.float()
        mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"].copy_(mean)
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        # What was lost is far smaller than the value: it joins the update before that meets the
        # value.
        update = (
            mean.div_(scale)
            .mul_(-lr / (1 - beta1 ** state["step"]))
            .sub_(value, alpha=lr * group["weight_decay"])
        )
        total = value.add(update.add_(state["lost"]) if low else update)
        parameter.copy_(total)
        if low:
            state["lost"].copy_(total.sub_(parameter))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the state back in the dtypes it was saved in; torch's own would cast it to the
        parameters'.
        """
        super().load_state_dict(dict(state_dict))
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, saved in state_dict["state"].items():
            for key, value in saved.items():
                if isinstance(value, Tensor):
                    self.state[parameters[number]][key] = value.to(
                        parameters[number].device, copy=True
                    )
