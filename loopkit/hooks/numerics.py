"""Numerics: find the first module with an output or a gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loopkit.errors import NotFiniteError
from loopkit.events import Hook
from loopkit.nested import leaves

if TYPE_CHECKING:
    from loopkit.run import Run


class Numerics(Hook):
    """End the run at the first module whose output, or the gradient of it, holds NaN or infinity.

    The error names the module. ``Fit(debug="numerics")`` adds this hook. It reads every output
    from the device, so steps are slower: use it to find a fault. With a loss scaler
    (``precision="fp16"``) gradients are not checked, because the scaler lets them overflow to find
    its scale.

    Examples:
        >>> Fit(debug="numerics").run(task)
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def on_fit_start(self, run: Run) -> None:
        """Register torch's hooks on every module and every trained parameter."""
        self._remove()
        backward = not run.strategy.settings.precision.scaled
        for name, module in run.task.named_modules():
            label = f"{name} ({type(module).__name__})" if name else type(module).__name__
            check = partial(_check_output, label, run, backward)
            self._handles.append(module.register_forward_hook(check, with_kwargs=True))
        if not backward:
            return
        for name, parameter in run.task.named_parameters():
            if parameter.requires_grad:
                check_gradient = _gradient_check(f"the gradient of the parameter {name}", run)
                self._handles.append(parameter.register_hook(check_gradient))  # type: ignore[no-untyped-call]

    def on_fit_end(self, run: Run) -> None:
        """Remove the hooks from the modules."""
        self._remove()

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Remove the hooks from the modules."""
        self._remove()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _check_output(
    label: str, run: Run, backward: bool, module: nn.Module, args: Any, options: Any, output: Any
) -> None:
    """Check the output of a module, and later the gradient of it."""
    for tensor in _floating(output):
        if not torch.isfinite(tensor).all():
            if not all(torch.isfinite(given).all() for given in _floating((args, options))):
                reason = "Its input is not finite already: look at the batch, or at earlier modules"
            elif not all(torch.isfinite(p).all() for p in module.parameters()):
                reason = "Its input is finite; its parameters are not"
            else:
                reason = "Its input and its parameters are finite"
            raise NotFiniteError(
                f"{_position(run)}: the output of {label} is not finite: {_describe(tensor)}. "
                f"{reason}"
            )
        if backward and tensor.requires_grad:
            check = _gradient_check(f"the gradient at the output of {label}", run)
            tensor.register_hook(check)  # type: ignore[no-untyped-call]


def _gradient_check(what: str, run: Run) -> Callable[[Tensor], None]:
    def check(gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise NotFiniteError(
                f"{_position(run)}: {what} is not finite: {_describe(gradient)}. It is the first "
                "one in the backward pass: look at what is computed from it"
            )

    return check


def _position(run: Run) -> str:
    return f"step {run.progress.step + 1} (epoch {run.progress.epoch})"


def _describe(tensor: Tensor) -> str:
    nans, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nans} NaN and {infinite} infinite of {tensor.numel()}, shape {tuple(tensor.shape)}"


def _floating(value: Any) -> Iterator[Tensor]:
    """Yield the floating-point and complex tensors in nested containers."""
    for leaf in leaves(value):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf
