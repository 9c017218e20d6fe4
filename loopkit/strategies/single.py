"""SingleDevice: one process, one device: a CPU, a CUDA GPU or an Apple GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.devices import find_device
from loopkit.distributed.communicator import Communicator
from loopkit.keywords import checks_keywords
from loopkit.optim.fused import stepper
from loopkit.rng import torch_seeder
from loopkit.strategies import optimizer_state
from loopkit.strategies.activation_checkpointing import (
    apply_activation_checkpointing,
    parse_activation_checkpointing,
)
from loopkit.strategies.base import ComputeSettings, Strategy
from loopkit.strategies.compile import compile_blocks, compiled
from loopkit.strategies.gradients import finalize_gradients
from loopkit.strategies.nonfinite import NonFiniteGuard, propagate_nonfinite
from loopkit.strategies.precision import forward_context


@checks_keywords
class SingleDevice(Strategy):
    """Everything on one device, in this process.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
    """

    def __init__(self, device: str = "auto") -> None:
        self._take(find_device(device))
        self.name = type(self).__name__
        self.optimizers = {}
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._steppers: dict[str, Callable[[], Any]] = {}
        self._guard: NonFiniteGuard | None = None
        self.scaler: Any = None
        self._compiled: dict[str, Callable[..., Any]] = {}
        self.init_context = nullcontext

    def _take(self, device: torch.device, world: Communicator | None = None) -> None:
        self.device = device
        self.set_seed = torch_seeder(device)
        if world is not None:
            self.world, self.rank, self.world_size = world, world.rank, world.size
            self.dp = world

    def setup_environment(self, numerics: ComputeSettings | None = None) -> None:
        """Fix the numerics; the device is this process's already."""
        self.settings = numerics or ComputeSettings()
        _, offload = parse_activation_checkpointing(self.settings.activation_checkpointing)
        self.forward_context = forward_context(
            self.settings.precision, self.device, offload=offload
        )
        self.scaler = (
            torch.amp.GradScaler(self.device.type) if self.settings.precision.scaled else None
        )
        self._guard = None  # nothing of an earlier run with this object

    def setup_module(self, task: nn.Module) -> None:
        """Move ``task`` to the device, in the precision's dtype; compile or recompute its blocks if
        asked to.
        """
        self._move(task)
        self._task = task
        self._equip(task)

    def _equip(self, task: nn.Module) -> None:
        """Have blocks compiled or computed again, as the numerics say."""
        self._compiled = {}
        apply_activation_checkpointing(task, self.settings.activation_checkpointing)
        how = self.settings.compile
        if how is not None and how.scope == "blocks":
            compile_blocks(task, how)

    def _move(self, task: nn.Module) -> None:
        task.to(self.device, self.settings.precision.storage)

    def setup_optimizers(self, optimizers: dict[str, Optimizer]) -> None:
        """Take the optimizers, made over the placed parameters."""
        self.optimizers = optimizers
        self._steppers = {name: stepper(optimizer) for name, optimizer in optimizers.items()}
        self._parameters = {
            name: [p for group in optimizer.param_groups for p in group["params"]]
            for name, optimizer in optimizers.items()
        }
        if self.settings.on_nan != "ignore":
            watched = () if self.scaler is not None else optimizers.values()
            # Gradients have the dtype of their parameters; a loss may be made in another one.
            dtypes = {p.dtype for parameters in self._parameters.values() for p in parameters}
            uniform = dtypes == {torch.float32} and self.settings.precision.storage is None
            self._guard = NonFiniteGuard(
                self.settings.on_nan,
                self.device,
                watched,
                uniform=uniform,
                spans_ranks=self.world_size > 1,
            )
        self._finalize = partial(
            finalize_gradients,
            settings=self.settings,
            optimizers=optimizers,
            scaler=self.scaler,
            guard=self._guard,
        )

    def step_fn(self, name: str) -> Callable[..., Any]:
        """The task's own bound method, compiled if asked to: nothing stands between the loop and
        the task.
        """
        if self.settings.compile is None or self.settings.compile.scope == "blocks":
            return getattr(self._task, name)  # type: ignore[no-any-return]
        if name not in self._compiled:
            self._compiled[name] = compiled(getattr(self._task, name), self.settings.compile)
        return self._compiled[name]

    def set_gradient_sync(self, last: bool) -> None:
        """Nothing to synchronise."""

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``; see ``Strategy.backward``."""
        guard, scaler = self._guard, self.scaler
        if guard is not None:
            value = loss.detach() if value is None else value
            if guard.spans_ranks:
                loss = propagate_nonfinite(loss)
            if scaler is not None:
                guard.check([value])
                loss = guard.poison(loss)
            elif not guard.spans_ranks:
                guard.losses.append(value)
        if scaler is not None:
            loss = scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Make the gradients ready for the update; see ``Strategy.finalize_gradients``."""
        names = names or tuple(self._parameters)
        grads: list[Tensor] = []
        for name in names:
            for parameter in self._parameters[name]:
                if parameter.grad is not None:
                    grads.append(parameter.grad)
        return self._finalize([grads], names, divisor, want_norm=want_norm)

    def optimizer_step(self, names: Sequence[str] | None = None) -> None:
        """Step the named optimizers (None: all) and clear their gradients."""
        scaler, guard = self.scaler, self._guard
        for name in names or self.optimizers:
            if scaler is not None:
                scaler.step(self.optimizers[name])
            elif guard is None or not guard.blocks_update:
                self._steppers[name]()
            for parameter in self._parameters[name]:
                parameter.grad = None
        if scaler is not None:
            scaler.update()

    def finish_step(self) -> bool:
        """Finish a step; see ``Strategy.finish_step``."""
        guard = self._guard
        # Where the host sees the flag, a good step costs no further call.
        if guard is None or guard.host_flag == 0:
            return False
        return guard.finish_step()

    def pop_nonfinite_steps(self) -> int:
        """How many steps since last asked were not finite, on any rank; reads the device."""
        return max(
            self.world.all_gather_object(
                0 if self._guard is None else self._guard.pop_nonfinite_steps()
            )
        )

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by the user's names."""
        return {
            name: tensor
            for name, tensor in self._task.state_dict().items()
            if isinstance(tensor, Tensor)
        }

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back parameters and buffers, all of them."""
        self._task.load_state_dict(state)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizers' tensors by "<parameter>/<state>", and the rest as plain values."""
        return optimizer_state.optimizer_state(self.optimizers, self._task)

    def load_optimizer_state(
        self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], path: Path
    ) -> Callable[[], None]:
        """What loads a saved state that fits; see ``Strategy.load_optimizer_state``."""
        return optimizer_state.loading(self.optimizers, self._task, tensors, plain, path)

    def reshard(self) -> None:
        """Nothing was gathered for a forward pass."""

    def teardown(self, failed: bool = False) -> None:
        """Nothing to leave."""
