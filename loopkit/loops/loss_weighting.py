"""LossWeighting: the arithmetic that makes accumulation over micro-batches and ranks exact."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loopkit.data.micro_batches import MicroBatches
from loopkit.distributed.communicator import Communicator
from loopkit.errors import DataError, TaskError
from loopkit.task import Task, name_of


class LossWeighting:
    """Scale the losses of one step so that the added gradients are those of its exact mean loss.

    The exact mean of a step is ``sum(weight * loss) / sum(weight)`` over all its micro-batches on
    all ranks. A strategy averages gradients over the ranks.

    - Without weights, a micro-batch has the weight of its samples. All sizes are known before the
      first backward pass, so each loss gets its final factor.
    - With weights, the sum is known only after the last forward pass. Each loss is multiplied by
      ``weight / scale``, and ``divisor`` returns the rest of the division.

    The scale is a power of two, so no bit of the result depends on it. It keeps the gradients in
    the range of one micro-batch's gradients. On several ranks it must be the same on all of them.

    Args:
        batches: the micro-batches of the step.
        dp: the data-parallel ranks.
        step: the task and the name of its method that returns the losses, for error messages.
        scale: the scale of this run; None computes it from the first weights.
        combined: False for a step of one micro-batch on one rank, which scales nothing.
    """

    def __init__(
        self,
        batches: MicroBatches,
        dp: Communicator,
        *,
        step: tuple[Task, str],
        scale: float | None = None,
        combined: bool = True,
    ) -> None:
        self.scale: Any = scale
        self._batches = batches
        self._dp = dp
        self._step = step
        self._combined = combined
        self._weights: list[Any] = []

    def scaled(self, loss: Tensor, weight: Any, size: int) -> Tensor:
        """Return the loss of the next micro-batch, ready for its backward pass.

        Args:
            loss: the mean loss of the micro-batch, a scalar.
            weight: the number of terms in that mean, detached and exact; None without weights.
            size: samples in the micro-batch; 0 for a dummy batch, which has the weight 0.
        """
        if weight is None:
            if not self._combined:
                return loss
            return loss / (self._batches.total / (size * self._dp.size)) if size else _zeroed(loss)
        weight = weight if size else 0
        self._weights.append(weight)
        if not self._combined:
            return loss
        if self.scale is None:
            self.scale = self._first_scale(weight)
        part = weight / self.scale
        if isinstance(weight, Tensor):
            # A mean over no terms is NaN, and NaN times a weight of 0 would still be NaN.
            return torch.mul(torch.where(weight > 0, loss, 0.0), part.to(loss.dtype))
        return loss * part if part else _zeroed(loss)

    def divisor(self) -> Tensor | float | None:
        """Return the number that the added gradients must still be divided by; None for none.

        Raises:
            TaskError: some micro-batches had a weight and others had none.
            DataError: the weights of the step add up to 0.
        """
        if not self._weights:
            return None
        count, where = len(self._batches), f"{name_of(self._step[0])}.{self._step[1]}"
        if len(self._weights) != count:
            raise TaskError(
                f"{where} gave a weight for {len(self._weights)} of {count} micro-batches: "
                "give it for all or none"
            )
        total = sum(self._weights[1:], start=self._weights[0])
        if self._dp.size > 1:
            if isinstance(total, Tensor):
                total = self._dp.all_reduce_tensor(total)
            else:
                (total,) = self._dp.all_reduce_sum(total)
        if not isinstance(total, Tensor) and total <= 0:
            raise DataError(f"{where} returned weight={total!r}: the step has nothing to train on")
        return total / self.scale / self._dp.size if self._combined else None

    def _first_scale(self, weight: Any) -> Any:
        """Return the largest power of two up to the first weight, over all ranks."""
        if self._dp.size > 1:
            largest = max(self._dp.all_gather_object(float(weight)))
            return 2.0 ** math.floor(math.log2(max(largest, 1.0)))
        if isinstance(weight, Tensor):
            return power_of_two_below(weight.clamp(min=1))
        return 2.0 ** math.floor(math.log2(max(weight, 1)))


def power_of_two_below(value: Tensor) -> Tensor:
    """Return the largest power of two up to ``value``, a float tensor of at least 1.

    The exponent bits of a float hold it exactly on every device, without a read by the host.
    """
    double = value.dtype == torch.float64
    bits, exponent = (torch.int64, 0x7FF << 52) if double else (torch.int32, 0xFF << 23)
    return (value.view(bits) & exponent).view(value.dtype)


def _zeroed(loss: Tensor) -> Tensor:
    """Return 0 with a graph to the parameters, also where the loss is NaN."""
    return torch.where(torch.zeros_like(loss, dtype=torch.bool), loss, 0.0)
