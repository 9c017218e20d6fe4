"""What every strategy does to gradients between the backward pass and the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loopkit.errors import TaskError

if TYPE_CHECKING:
    from loopkit.strategies.module_strategy import ModuleStrategy


def finalize_gradients(
    strategy: ModuleStrategy,
    grads: Sequence[list[Tensor]],
    names: Iterable[str],
    divisor: Tensor | float | None,
    *,
    want_norm: bool,
    reduce_norm: Callable[[], Tensor] | None = None,
) -> Tensor | None:
    """Divide, unscale, measure, check and clip gradients in place, in this order.

    A loss scaler checks gradients itself. Otherwise the strategy's ``guard`` does. With a scaler ``guard``
    has checked each rank's losses, and here all ranks learn the outcome.

    Args:
        strategy: tells the limits of clipping, the optimizers, the scaler and ``guard``.
        grads: the gradients that this process holds, in lists of one device each.
        names: the optimizers that the gradients belong to.
        divisor: a number, or a scalar tensor on any device; None divides by nothing.
        want_norm: whether the norm is needed though nothing is clipped by it.
        reduce_norm: returns the norm of all gradients, if ``grads`` is a part of them or is on
            several devices. Then ``guard`` checks that norm, which all ranks have alike. None takes
            the norm of ``grads``, and ``guard`` checks each gradient.

    Returns:
        The norm before clipping, a scalar on the strategy's device, if gradients are clipped by it
        or ``want_norm``; else None.

    Raises:
        TaskError: there is no gradient.
    """
    settings, scaler, guard = strategy.settings, strategy.scaler, strategy.guard
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
            scaler.unscale_(strategy.optimizers[name])
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
        # torch.nn.utils.clip_grads_with_norm_ on lists of gradients. A number divided by a tensor
        # is this product, to the bit.
        factor = (norm + 1e-6).reciprocal_().mul_(settings.clip_norm).clamp_(max=1.0)
        for held in lists:
            torch._foreach_mul_(held, factor if len(lists) == 1 else factor.to(held[0].device))
    if settings.clip_value is not None:
        for held in lists:
            torch._foreach_clamp_min_(held, -settings.clip_value)
            torch._foreach_clamp_max_(held, settings.clip_value)
    return norm if want_norm or settings.clip_norm is not None else None
