"""Averages of parameters, as EMA and SWA keep them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loopkit.errors import CheckpointError, OptionError
from loopkit.sharded import local_tensors
from loopkit.strategies.dtensor import shard_like

if TYPE_CHECKING:
    from loopkit.run import Run

_HALF = (torch.float16, torch.bfloat16)


def trained_parameters(run: Run) -> dict[str, nn.Parameter]:
    """Return the parameters to average: those that the optimizers hold, but integers.

    Raises:
        OptionError: the optimizers of the strategy hold no parameters of the task.
    """
    held = held_parameters(run)
    return {n: p for n, p in held.items() if p.is_floating_point() or p.is_complex()}


def held_parameters(run: Run) -> dict[str, nn.Parameter]:
    """Return the parameters that the run's optimizers hold, each under one name.

    Raises:
        OptionError: the optimizers of the strategy hold no parameters of the task.
    """
    if not run.strategy.exposes_gradients:
        raise OptionError(
            "EMA, SWA, Unfreeze and GradMonitor need the parameters that the optimizer holds, and "
            f"under {type(run.strategy).__name__} it holds flat parts of them: leave the hook out, "
            "or take strategy='ddp' or 'fsdp'"
        )
    held = {
        id(p) for o in run.optimizers.values() for group in o.param_groups for p in group["params"]
    }
    return {name: p for name, p in run.task.named_parameters() if id(p) in held}


class AveragedParameters:
    """Moving averages of parameters, on their devices.

    Averages of float16 and bfloat16 parameters are kept in float32: with a small weight, an update
    would be rounded away in half precision.

    Args:
        parameters: the parameters by name. The averages start as copies of them.
        saved: averages to start from instead.
        label: the name of the hook, for messages.

    Attributes:
        tensors: the averages by name.

    Raises:
        CheckpointError: the saved averages are of other parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        saved: Mapping[str, Tensor] | None = None,
        label: str = "Averages",
    ) -> None:
        if saved is not None:
            _check_same(parameters, saved, label)
        self.tensors: dict[str, Tensor] = {}
        self._any_half = any(p.dtype in _HALF for p in parameters.values())
        for name, parameter in parameters.items():
            dtype = torch.float32 if parameter.dtype in _HALF else parameter.dtype
            source = parameter.detach() if saved is None else shard_like(saved[name], parameter)
            self.tensors[name] = source.to(parameter.device, dtype, copy=True)

    @torch.no_grad()
    def move(self, parameters: Mapping[str, nn.Parameter], weight: float) -> None:
        """Compute ``average += weight * (parameter - average)`` for all, on the device."""
        # The parts of this rank: one call does not take sharded and whole tensors together.
        averages = local_tensors(self.tensors.values())
        values = local_tensors(parameters[name] for name in self.tensors)
        if self._any_half:
            values = [value.to(average.dtype) for value, average in zip(values, averages)]
        torch._foreach_lerp_(averages, values, weight)

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copy the averages into the parameters.

        Raises:
            CheckpointError: a parameter is missing.
        """
        missing = [name for name in self.tensors if name not in parameters]
        if missing:
            raise CheckpointError(
                f"the averages hold {missing[0]!r}, which the task does not have: give the task "
                "that they are of"
            )
        for name, average in self.tensors.items():
            parameters[name].copy_(average)


def _check_same(
    parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], label: str
) -> None:
    both = parameters.keys() & saved.keys()
    wrong = parameters.keys() ^ saved.keys()
    wrong |= {name for name in both if parameters[name].shape != saved[name].shape}
    if wrong:
        raise CheckpointError(
            f"the checkpoint holds {label}'s averages of other parameters than are trained now: "
            f"{', '.join(sorted(wrong)[:6])}. Resume with the same parameters, or without {label}"
        )
