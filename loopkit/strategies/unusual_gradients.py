"""Sparse and complex gradients, as real dense parts that every kernel takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.errors import OptionError
from loopkit.optim.specs import sparse_parameters
from loopkit.strategies.gradients import finalize_gradients

if TYPE_CHECKING:
    from loopkit.strategies.module_strategy import ModuleStrategy


def any_unusual(
    task: nn.Module, parameters: Iterable[nn.Parameter], grads: Sequence[list[Tensor]]
) -> bool:
    """Return whether any gradient is sparse or complex, or may become so.

    Args:
        task: the task; its embeddings say whether their gradients are sparse.
        parameters: the parameters that are trained.
        grads: the gradients of the first step.
    """
    sparse = sparse_parameters(task)
    return any(p.is_complex() or id(p) in sparse for p in parameters) or any(
        gradient.is_sparse for held in grads for gradient in held
    )


def leave_fused(optimizer: Optimizer) -> None:
    """Step by another implementation of torch the groups in which a gradient is sparse."""
    for group in optimizer.param_groups:
        if any(p.grad is not None and p.grad.is_sparse for p in group["params"]):
            group.update({key: False for key in ("fused", "foreach") if group.get(key)})


def refuse_complex(task: nn.Module, option: str, reason: str) -> None:
    """Refuse a setting that complex parameters do not survive.

    Raises:
        OptionError: the task has a complex parameter, which is named.
    """
    name = next((name for name, p in task.named_parameters() if p.is_complex()), None)
    if name is not None:
        raise OptionError(f"{option} with the complex parameter {name}: {reason}. Take 'fp32'")


def finalize_unusual(
    strategy: ModuleStrategy,
    grads: Sequence[list[Tensor]],
    names: Iterable[str],
    divisor: Tensor | float | None,
    **options: Any,
) -> Tensor | None:
    """Finalize gradients of any kind in place; see ``finalize_gradients``.

    A sparse gradient is coalesced, and its values are finalized: their norm is that of the dense
    gradient. Of a complex gradient, the real and the imaginary parts are; ``clip_value`` bounds each
    of them.
    """
    coalesced: dict[int, Tensor] = {}
    for name in names:
        for group in strategy.optimizers[name].param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    before, parameter.grad = parameter.grad, parameter.grad.coalesce()
                    coalesced[id(before)] = parameter.grad
    parts = [[_part(coalesced.get(id(grad), grad)) for grad in held] for held in grads]
    return finalize_gradients(strategy, parts, names, divisor, **options)


def _part(gradient: Tensor) -> Tensor:
    """Return the values of a gradient as a dense real tensor that shares its memory."""
    values = gradient._values() if gradient.is_sparse else gradient
    return torch.view_as_real(values) if values.is_complex() else values
