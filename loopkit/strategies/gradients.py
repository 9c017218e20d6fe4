"""What every strategy does to gradients between the backward pass and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loopkit.errors import TaskError

if TYPE_CHECKING:
    from loopkit.strategies.base import ComputeSettings
    from loopkit.strategies.nonfinite import NonFiniteGuard


def finalize_gradients(
    grads: Sequence[list[Tensor]],
    names: Iterable[str],
    divisor: Tensor | float | None,
    *,
    settings: ComputeSettings,
    optimizers: Mapping[str, Optimizer],
    scaler: Any,
    guard: NonFiniteGuard | None,
    want_norm: bool,
    reduce_norm: Callable[[], Tensor] | None = None,
) -> Tensor | None:
    """Divide, unscale, measure, check and clip gradients in place, in this order.

    Args:
        grads: the gradients that this process holds, in lists of one device each.
        names: the optimizers that the gradients belong to, of ``optimizers``.
        divisor: a number, or a scalar tensor on any device; None divides by nothing.
        scaler: the loss scaler, which checks gradients itself; None if losses are not scaled.
        guard: checks gradients and losses otherwise; None under ``on_nan="ignore"``. With a
            scaler it has checked each rank's losses, and here all ranks learn the outcome.
        reduce_norm: returns the norm of all gradients, if ``grads`` is a part of them or is on
            several devices. Then ``guard`` checks that norm, which all ranks have alike. None takes
            the norm of ``grads``, and ``guard`` checks each gradient.

    Returns:
        The norm before clipping, a scalar on the strategy's device, if gradients are clipped by it
        or ``want_norm``; else None.

    Raises:
        TaskError: there is no gradient.
    """
    lists = list(filter(None, grads))
    if not lists:
        raise TaskError(
            f"the loss reaches no parameter of {', '.join(names)}: no gradient was computed"
        )
    if divisor is not None:
        for held in lists:
            here = divisor.to(held[0].device) if isinstance(divisor, Tensor) else divisor
            torch._foreach_div_(held, here)
    if scaler is not None:
        if guard is not None and guard.spans_ranks:
            guard.sync()
        guard = None
        for name in names:
            scaler.unscale_(optimizers[name])
    norm = None
    if want_norm or settings.clip_norm is not None or (guard is not None and reduce_norm):
        # The bits of torch's get_total_norm, which takes 25 µs more: it groups by device first.
        norm = (
            reduce_norm()
            if reduce_norm is not None
            else torch.linalg.vector_norm(torch.stack(torch._foreach_norm(lists[0])))
        )
    if guard is not None:
        guard.check([*(lists[0] if norm is None else (norm,)), *guard.losses])
        guard.losses.clear()
    if settings.clip_norm is not None and norm is not None:
        # torch.nn.utils.clip_grads_with_norm_ on lists of gradients.
        factor = torch.clamp(settings.clip_norm / (norm + 1e-6), max=1.0)
        for held in lists:
            torch._foreach_mul_(held, factor if len(lists) == 1 else factor.to(held[0].device))
    if settings.clip_value is not None:
        for held in lists:
            torch._foreach_clamp_min_(held, -settings.clip_value)
            torch._foreach_clamp_max_(held, settings.clip_value)
    return norm if want_norm or settings.clip_norm is not None else None
