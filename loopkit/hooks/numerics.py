"""Numerics: the first module whose output or gradient is not finite, by name."""

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
    """Ends the run at the first module whose output, or the gradient of it, holds NaN or infinity,
    and names it.

    Every output is read from the device, so steps are slower: this is for finding a fault. The same
    as ``Fit(debug="numerics")``. With a loss scaler (``precision="fp16"``) gradients are left
    alone, since the scaler looks for its scale by letting them overflow.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def on_fit_start(self, run: Run) -> None:
        """Listen to every module and every trained parameter."""
        self._release()
        backward = not run.strategy.settings.precision.scaled
        for name, module in run.task.named_modules():
            called = f"{name} ({type(module).__name__})" if name else type(module).__name__
            look = partial(_check_output, called, run, backward)
            self._handles.append(module.register_forward_hook(look, with_kwargs=True))
        if backward:
            for name, parameter in run.task.named_parameters():
                if parameter.requires_grad:
                    look_at = _gradient_check(f"the gradient of the parameter {name}", run)
                    self._handles.append(parameter.register_hook(look_at))  # type: ignore[no-untyped-call]

    def on_fit_end(self, run: Run) -> None:
        """Listen no more."""
        self._release()

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Listen no more."""
        self._release()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _check_output(
    called: str, run: Run, backward: bool, module: nn.Module, args: Any, options: Any, output: Any
) -> None:
    for tensor in _floating(output):
        if not torch.isfinite(tensor).all():
            if not all(torch.isfinite(given).all() for given in _floating((args, options))):
                why = "What it was given is not finite already: look at the batch, or at what is computed before it"
            elif not all(torch.isfinite(p).all() for p in module.parameters()):
                why = "What it was given is finite; its parameters are not"
            else:
                why = "What it was given and its parameters are finite"
            raise NotFiniteError(
                f"{_when(run)}: the output of {called} is not finite: {_count(tensor)}. {why}"
            )
        if backward and tensor.requires_grad:
            check = _gradient_check(f"the gradient at the output of {called}", run)
            tensor.register_hook(check)  # type: ignore[no-untyped-call]


def _gradient_check(what: str, run: Run) -> Callable[[Tensor], None]:
    def check(gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            raise NotFiniteError(
                f"{_when(run)}: {what} is not finite: {_count(gradient)}. It is the first one in "
                f"the "
                "backward pass: look at what is computed from it"
            )

    return check


def _when(run: Run) -> str:
    return f"step {run.progress.step + 1} (epoch {run.progress.epoch})"


def _count(tensor: Tensor) -> str:
    nans, infinite = int(torch.isnan(tensor).sum()), int(torch.isinf(tensor).sum())
    return f"{nans} NaN and {infinite} infinite of {tensor.numel()}, shape {tuple(tensor.shape)}"


def _floating(value: Any) -> Iterator[Tensor]:
    for leaf in leaves(value):
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
            yield leaf
