"""KahanAdamW: AdamW for parameters in bf16, with compensated (Kahan) summation of the updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class KahanAdamW(Optimizer):
    """AdamW with compensated summation (Kahan 1965; for training, Zamirai et al. 2020).

    A parameter in bf16 has 8 bits of precision and loses updates smaller than 1/256 of itself. Here
    each update is computed in fp32. The part that the parameter cannot hold is kept beside it, and
    added to the next update.

    The first moment is bf16. The second is fp32: in bf16, 0.999 times a number rounds to the number
    itself, so the moment would never fall. Parameter and state take 10 bytes per element, against
    12 for AdamW with fp32 weights. A parameter in fp16 is treated in the same way. One of another
    dtype needs no compensation and is updated in fp32.

    Args:
        params: parameters, or dicts of parameter groups.
        lr: the learning rate.
        betas: the decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.

    Raises:
        ValueError: a rate, decay or beta is out of range.
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
        state = self.state[parameter]
        beta1, beta2 = group["betas"]
        lr = group["lr"]
        low = parameter.dtype in (torch.bfloat16, torch.float16)
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if low:
                state["lost"] = torch.zeros_like(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        grad = parameter.grad.float()
        value = parameter.float()
        mean = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        state["exp_avg"].copy_(mean)
        scale = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        # The lost part is far smaller than the value, so it is added to the update first.
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
        """Load the state in the dtypes it was saved in; torch would cast it to the parameters'."""
        super().load_state_dict(dict(state_dict))
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, saved in state_dict["state"].items():
            for key, value in saved.items():
                parameter = parameters[number]
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(parameter.device, copy=True)
