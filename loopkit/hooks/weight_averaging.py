"""Averages of parameters: what EMA and SWA have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from loopkit.errors import CheckpointError, OptionError
from loopkit.strategies.dtensor import shard_like

if TYPE_CHECKING:
    from loopkit.run import Run

_COARSE = (torch.float16, torch.bfloat16)


def trained_parameters(run: Run) -> dict[str, nn.Parameter]:
    """The floating parameters that the run's optimizers hold, by the user's names, each once.

    Raises:
        OptionError: the strategy keeps them to itself.
    """
    if not run.strategy.exposes_gradients:
        raise OptionError(
            f"EMA, SWA, Unfreeze and GradMonitor follow the parameters that the optimizer holds, "
            f"and "
            f"under {type(run.strategy).__name__} it holds flat parts of them: leave the hook out, "
            f"or "
            "take strategy='ddp' or 'fsdp'"
        )
    held = {
        id(p) for o in run.optimizers.values() for group in o.param_groups for p in group["params"]
    }
    return {n: p for n, p in run.task.named_parameters() if id(p) in held and p.is_floating_point()}


class AveragedParameters:
    """Moving averages of parameters, on their devices; in single precision where a parameter's own
    is lower.

    With a small weight, a change below the resolution of float16 or bfloat16 would be lost at each
    update.

    Args:
        parameters: what is averaged, by name; the averages start as copies.
        saved: averages to go on from instead.
        who: whose they are, for messages.

    Raises:
        CheckpointError: the saved averages are of other parameters.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        saved: Mapping[str, Tensor] | None = None,
        who: str = "Averages",
    ) -> None:
        if saved is not None:
            wrong = parameters.keys() ^ saved.keys()
            wrong |= {
                n for n in parameters.keys() & saved.keys() if parameters[n].shape != saved[n].shape
            }
            if wrong:
                raise CheckpointError(
                    f"the checkpoint holds {who}'s averages of other parameters than are trained "
                    f"now: {', '.join(sorted(wrong)[:6])}. Resume with the same parameters, or "
                    f"without {who}"
                )
        self.tensors: dict[str, Tensor] = {}
        self._coarse = any(p.dtype in _COARSE for p in parameters.values())
        for name, parameter in parameters.items():
            dtype = torch.float32 if parameter.dtype in _COARSE else parameter.dtype
            source = parameter.detach() if saved is None else shard_like(saved[name], parameter)
            self.tensors[name] = source.to(parameter.device, dtype, copy=True)

    @torch.no_grad()
    def move(self, parameters: Mapping[str, nn.Parameter], weight: float) -> None:
        """``average += weight * (parameter - average)`` for all, on the device."""
        averages = list(self.tensors.values())
        values: list[Tensor] = [parameters[name] for name in self.tensors]
        if self._coarse:
            values = [value.to(average.dtype) for value, average in zip(values, averages)]
        torch._foreach_lerp_(averages, values, weight)

    @torch.no_grad()
    def copy_to(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the parameters the averages' values.

        Raises:
            CheckpointError: a parameter is missing.
        """
        missing = [name for name in self.tensors if name not in parameters]
        if missing:
            raise CheckpointError(
                f"the averages hold {missing[0]!r}, which the task has not: give the one they are "
                f"of"
            )
        for name, average in self.tensors.items():
            parameters[name].copy_(average)
