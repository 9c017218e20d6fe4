"""GradMonitor: gradient norms and relative sizes of updates, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from loopkit.checks import checked_choice
from loopkit.durations import Duration
from loopkit.events import Hook
from loopkit.hooks.cadence import cadence_in_steps
from loopkit.hooks.weight_averaging import trained_parameters
from loopkit.keywords import checks_keywords

if TYPE_CHECKING:
    from loopkit.run import Run

_TINY = 1e-12


@checks_keywords
class GradMonitor(Hook):
    """Log ``grad_norm/<layer>`` and ``update_ratio/<layer>``, without reading the device.

    The norm is that of the gradient which the optimizer is about to use: complete, unscaled and
    clipped. The ratio is the norm of the update divided by the norm of the weights before it. A
    ratio near 0.001 is usual; a much larger or smaller one means that the layer's learning rate is
    wrong. ``train/grad_norm``, the norm of all gradients before clipping, is logged too.

    Examples:
        >>> Fit(hooks=[GradMonitor(every="100 steps")]).run(task)

    Args:
        every: the cadence: steps, or "1 epoch" or "1%" if the data has a length.
        per: "layer" (the module that holds a parameter) or "all" (everything as one).

    Raises:
        OptionError: an argument is not accepted.
    """

    may_request = False

    def __init__(
        self, every: str | int = "50 steps", per: Literal["layer", "all"] = "layer"
    ) -> None:
        self._every = Duration.parse(every, "GradMonitor(every=)", by_clock=False)
        self._per = checked_choice(per, "GradMonitor(per=)", ("layer", "all"))
        self._before: dict[str, Tensor] = {}

    def on_setup(self, run: Run) -> None:
        """Find the steps at which to measure.

        Raises:
            OptionError: ``every`` needs data with a length.
        """
        self._before = {}
        if run.loader is not None:
            self._cadence = cadence_in_steps(self._every, run.length, "GradMonitor(every=)")
            self._due = self._cadence.next_step(run.progress.step)
            self._layers = {name: self._layer(name) for name in trained_parameters(run)}

    def on_before_update(self, run: Run, grad_norm: Tensor | None) -> None:
        """Measure the gradients, and copy the weights until the update is done."""
        if run.progress.step + 1 != self._due:
            return
        parameters = {
            n: p for n, p in run.task.named_parameters() if n in self._layers and p.grad is not None
        }
        norms = self._norms({name: p.grad for name, p in parameters.items() if p.grad is not None})
        run.log({f"grad_norm/{layer}": norm for layer, norm in norms.items()})
        self._before |= {name: p.detach().clone() for name, p in parameters.items()}

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Measure the update."""
        if run.progress.step != self._due:
            return
        self._due = self._cadence.next_step(run.progress.step)
        before, self._before = self._before, {}
        if not before:
            return  # a custom step that updated nothing
        after = dict(run.task.named_parameters())
        lengths = self._norms(before)
        changes = self._norms(
            {name: after[name].detach() - value for name, value in before.items()}
        )
        ratios = {
            layer: change / lengths[layer].clamp(min=_TINY) for layer, change in changes.items()
        }
        run.log({f"update_ratio/{layer}": ratio for layer, ratio in ratios.items()})

    def _layer(self, name: str) -> str:
        return "all" if self._per == "all" else name.rpartition(".")[0] or name

    def _norms(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the 2-norm over all tensors of each layer, as scalars on the device."""
        parts: dict[str, list[Tensor]] = {}
        for name, norm in zip(tensors, torch._foreach_norm(list(tensors.values()))):
            parts.setdefault(self._layers[name], []).append(norm.float())
        return {
            layer: torch.linalg.vector_norm(torch.stack(norms)) for layer, norms in parts.items()
        }
