"""torch's fused kernels: with less Python around them on the CPU, and where their contract is narrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from loopkit.errors import OptionError
from loopkit.sharded import is_sharded, local_tensors

_KERNELS = {torch.optim.AdamW: "_fused_adamw_", torch.optim.Adam: "_fused_adam_"}
# The kernels are not public in torch: a kernel with other arguments is not called from here.
_ARGUMENTS = (
    "self",
    "grads",
    "exp_avgs",
    "exp_avg_sqs",
    "max_exp_avg_sqs",
    "state_steps",
    "lr",
    "beta1",
    "beta2",
    "weight_decay",
    "eps",
    "amsgrad",
    "maximize",
    "grad_scale",
    "found_inf",
)
_GLOBAL_HOOKS = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
_UNUSUAL = ("amsgrad", "capturable", "differentiable", "foreach")


def step_function(optimizer: Optimizer) -> Callable[[], Any]:
    """Return the function that steps ``optimizer``: a FusedStep, or its own ``step``."""
    if _is_supported(optimizer):
        return FusedStep(optimizer)
    if isinstance(optimizer, torch.optim.SGD) and any(
        group["fused"] and group["momentum"] for group in optimizer.param_groups
    ):
        return lambda: step_with_momentum(optimizer)
    # Looked up at each call, because torch's schedulers replace the method.
    return lambda: optimizer.step()


def step_with_momentum(optimizer: Optimizer) -> Any:
    """Step a fused SGD in which one parameter may get its first gradient later than others.

    torch's kernel cannot start one momentum buffer of a group later than another. A buffer of zeros
    gives what torch's other implementations give: the momentum begins as the gradient.

    Raises:
        OptionError: with dampening, a buffer of zeros would not.
    """
    state = optimizer.state
    for group in optimizer.param_groups:
        started, new = False, []
        for parameter in group["params"]:
            if parameter.grad is not None:
                held = state.get(parameter)
                if held and held.get("momentum_buffer") is not None:
                    started = True
                else:
                    new.append(parameter)
        if started and new:
            if group["dampening"]:
                raise OptionError(
                    "torch's fused SGD with dampening cannot start the momentum of a parameter "
                    "later than that of others: pass SGD(fused=False)"
                )
            for parameter in new:
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.detach())
    return optimizer.step()


def _is_supported(optimizer: Optimizer) -> bool:
    # A scheduler of torch has put a wrapper around ``step``.
    wrapped = "step" in vars(optimizer)
    if type(optimizer) not in _KERNELS or wrapped:
        return False
    if not _is_known(_KERNELS[type(optimizer)]):
        return False
    return all(_is_plain(group, type(optimizer)) for group in optimizer.param_groups)


def _is_plain(group: dict[str, Any], kind: type[Optimizer]) -> bool:
    """Return whether a parameter group is fused, on the CPU, of one dtype and without options."""
    parameters = group["params"]
    if any(type(p.data) is not Tensor and not is_sharded(p) for p in parameters):
        return False
    if {p.device.type for p in parameters} != {"cpu"} or len({p.dtype for p in parameters}) != 1:
        return False
    return (
        bool(group["fused"])
        and isinstance(group["lr"], float)
        and not any(group[name] for name in _UNUSUAL)
        and group.get("decoupled_weight_decay", False) == (kind is torch.optim.AdamW)
    )


def _is_known(kernel: str) -> bool:
    """Return whether this torch has all that FusedStep takes from it, the kernel's arguments too."""
    if not hasattr(torch._C, "_set_grad_enabled"):
        return False
    operator = getattr(torch.ops.aten, kernel, None)
    if operator is None or not all(
        isinstance(getattr(torch_optimizer, name, None), dict) for name in _GLOBAL_HOOKS
    ):
        return False
    return tuple(argument.name for argument in operator.default._schema.arguments) == _ARGUMENTS


class FusedStep:
    """Calls the fused kernel as ``optimizer.step()`` does, to the bit, in a quarter of the time.

    To step four parameters, torch takes 40 us, of which the kernel takes 3. The state stays in the
    optimizer as torch made it. Only the step counts of a group become views of one tensor, so that
    one addition increments all. ``optimizer.step()`` itself does the first step, steps with a
    parameter without a gradient, and steps with hooks.

    Of a sharded parameter the kernel gets this rank's part, as the update of an element needs no other
    element. torch spends five times as long on finding that out in each step.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self._kernel: Any = getattr(torch, _KERNELS[type(optimizer)])
        self._global_hooks = [getattr(torch_optimizer, name) for name in _GLOBAL_HOOKS]
        self._counts: dict[int, tuple[list[int], list[Tensor], Tensor]] = {}
        self._sharded = any(is_sharded(p) for g in optimizer.param_groups for p in g["params"])

    def __call__(self) -> None:
        """Step the optimizer once."""
        optimizer = self.optimizer
        hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
        if hooked or self._global_hooks[0] or self._global_hooks[1]:
            optimizer.step()
            return
        state = optimizer.state
        rows = []
        # Loops, not comprehensions: before Python 3.12 each of those is a call of its own.
        for group in optimizer.param_groups:
            grads: list[Tensor] = []
            states: list[dict[str, Tensor]] = []
            means: list[Tensor] = []
            squares: list[Tensor] = []
            steps: list[Tensor] = []
            for parameter in group["params"]:
                held, grad = state.get(parameter), parameter.grad
                if not held or grad is None:
                    optimizer.step()
                    return
                states.append(held)
                grads.append(grad)
                means.append(held["exp_avg"])
                squares.append(held["exp_avg_sq"])
                steps.append(held["step"])
            parameters = group["params"]
            if self._sharded:
                if any(map(_differ, parameters, grads)):
                    optimizer.step()
                    return
                parameters, grads = local_tensors(parameters), local_tensors(grads)
                means, squares = local_tensors(means), local_tensors(squares)
            rows.append((group, parameters, states, grads, means, squares, steps))
        # As `with torch.no_grad()`, which takes 3 us here: as much as the kernel.
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            for number, (group, parameters, states, grads, means, squares, steps) in enumerate(
                rows
            ):
                known = self._counts.get(number)
                if known is None or known[0] != list(map(id, steps)):
                    known = self._counts[number] = _share_count(states, steps)
                known[2].add_(1)
                self._kernel(
                    parameters,
                    grads,
                    means,
                    squares,
                    [],
                    steps,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    amsgrad=False,
                    maximize=group["maximize"],
                )
        finally:
            torch._C._set_grad_enabled(enabled)


def _differ(parameter: Any, grad: Any) -> bool:
    """Return whether a gradient is split otherwise than its parameter."""
    return is_sharded(parameter) and parameter.placements != getattr(grad, "placements", None)


def _share_count(
    states: list[dict[str, Tensor]], steps: list[Tensor]
) -> tuple[list[int], list[Tensor], Tensor]:
    """Make the step counts views of one tensor.

    Returns:
        The ids of the views, the views themselves (so that Python does not use an id again), and
        the tensor.
    """
    count = torch.stack(steps)
    steps[:] = count.unbind()
    for held, step in zip(states, steps):
        held["step"] = step
    return list(map(id, steps)), list(steps), count
