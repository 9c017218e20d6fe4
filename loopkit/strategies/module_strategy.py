"""What the strategies share that train the task with torch's own modules and optimizers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.distributed.communicator import Communicator
from loopkit.distributed.gather import set_tp_size
from loopkit.dtypes import stored_dtype
from loopkit.module_state import is_extra, tensors_of
from loopkit.optim.fused import step_function
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
from loopkit.strategies.unusual_gradients import (
    any_unusual,
    finalize_unusual,
    leave_fused,
    refuse_complex,
)


class ModuleStrategy(Strategy):
    """A strategy under which the task is whole in this process, on one device.

    Subclasses say which ranks train together, and override what is different for them.
    """

    @abstractmethod
    def _join_ranks(self) -> tuple[torch.device, Communicator]:
        """Join the other ranks; return this rank's device, and the communicator over all ranks."""

    def setup_environment(self, settings: ComputeSettings | None = None) -> None:
        """Join the other ranks, if any, and take this rank's device; see ``Strategy``."""
        self.name = type(self).__name__
        self.settings = settings or ComputeSettings()
        self.device, self.world = self._join_ranks()
        self.dp = self.world
        set_tp_size(1)
        self.rank, self.world_size = self.world.rank, self.world.size
        self.set_seed = torch_seeder(self.device)
        self.init_context = nullcontext
        precision = self.settings.precision
        _, offload = parse_activation_checkpointing(self.settings.activation_checkpointing)
        self.forward_context = forward_context(precision, self.device, offload=offload)
        self.scaler = torch.amp.GradScaler(self.device.type) if precision.scaled else None
        self.optimizers = {}
        self._compiled: dict[str, Callable[..., Any]] = {}

    def setup_module(self, task: nn.Module) -> None:
        """Move ``task`` to the device, in the dtype of the precision; see ``Strategy``."""
        self._move(task)
        self._task = task
        self._prepare_blocks(task)

    def _move(self, task: nn.Module) -> None:
        device, storage = self.device, self.settings.precision.storage
        if storage is not None and any(
            p.is_complex() for p in (*task.parameters(), *task.buffers())
        ):
            # nn.Module.to would make complex parameters real.
            task._apply(lambda tensor: tensor.to(device, stored_dtype(tensor.dtype, storage)))  # type: ignore[no-untyped-call]
        else:
            task.to(device, storage)

    def _prepare_blocks(self, task: nn.Module) -> None:
        """Compile blocks, and have them compute activations again, as the settings say."""
        apply_activation_checkpointing(task, self.settings.activation_checkpointing)
        compile_settings = self.settings.compile
        if compile_settings is not None and compile_settings.scope == "blocks":
            compile_blocks(task, compile_settings)

    def setup_optimizers(self, optimizers: dict[str, Optimizer]) -> None:
        """Take the optimizers by name, which were made after ``setup_module``.

        Raises:
            OptionError: the loss is scaled, and a parameter is complex.
        """
        self.optimizers = optimizers
        self._steppers = {name: step_function(optimizer) for name, optimizer in optimizers.items()}
        self._parameters: dict[str, list[nn.Parameter]] = {
            name: [p for group in optimizer.param_groups for p in group["params"]]
            for name, optimizer in optimizers.items()
        }
        if self.scaler is not None:
            refuse_complex(self._task, "precision='fp16'", "torch scales no complex gradients")
        self.guard = self._build_guard() if self.settings.on_nan != "ignore" else None
        self._finalize: Callable[..., Tensor | None] = _finalize_first

    def _build_guard(self) -> NonFiniteGuard:
        # Gradients have the dtypes of their parameters. A loss may have another one.
        dtypes = {p.dtype for parameters in self._parameters.values() for p in parameters}
        return NonFiniteGuard(
            self.settings.on_nan,
            self.device,
            self.optimizers.values() if self.scaler is None else (),
            uniform=dtypes == {torch.float32} and self.settings.precision.storage is None,
            spans_ranks=self.world_size > 1,
        )

    def choose_finalize(self, grads: Sequence[list[Tensor]]) -> None:
        """Look once which kinds of gradients there are, for all steps of the run."""
        parameters = [p for held in self._parameters.values() for p in held]
        unusual = any_unusual(self._task, parameters, grads)
        if unusual:
            for name, optimizer in self.optimizers.items():
                leave_fused(optimizer)
                self._steppers[name] = step_function(optimizer)
        self._finalize = finalize_unusual if unusual else finalize_gradients

    def step_fn(self, name: str) -> Callable[..., Any]:
        """Return the task's own bound method, compiled if the settings say so."""
        if self.settings.compile is None or self.settings.compile.scope == "blocks":
            return getattr(self._task, name)  # type: ignore[no-any-return]
        if name not in self._compiled:
            self._compiled[name] = compiled(getattr(self._task, name), self.settings.compile)
        return self._compiled[name]

    def set_gradient_sync(self, last: bool) -> None:
        """Do nothing: one process has no gradients to synchronise."""

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``; see ``Strategy``."""
        guard, scaler = self.guard, self.scaler
        if guard is not None:
            if guard.spans_ranks:
                loss = propagate_nonfinite(loss)
            elif scaler is None:
                guard.losses.append(loss.detach() if value is None else value)
        if scaler is not None:
            if guard is not None:
                guard.check([loss.detach() if value is None else value])
                loss = guard.nan_while_raised(loss)
            loss = scaler.scale(loss)
        loss.backward()  # type: ignore[no-untyped-call]

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Make the gradients ready for the update; see ``Strategy``."""
        names = names or tuple(self._parameters)
        grads: list[Tensor] = []
        for name in names:
            for parameter in self._parameters[name]:
                grad = parameter.grad
                if grad is not None:
                    grads.append(grad)
        return self._finalize(self, [grads], names, divisor, want_norm=want_norm)

    def optimizer_step(self, names: Sequence[str] | None = None) -> None:
        """Step the named optimizers (None: all) and clear their gradients."""
        scaler, guard = self.scaler, self.guard
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
        """Finish a step; see ``Strategy``."""
        guard = self.guard
        if guard is None:
            return False
        # Where the host sees the flag, a step without a non-finite value costs no further call.
        # `not` of a NumPy scalar array takes a tenth of the time of a comparison with 0.
        flag = guard.host_flag
        return guard.finish_step() if flag is None or flag else False

    def pop_nonfinite_steps(self) -> int:
        """Return how many steps since the last call had a non-finite value; see ``Strategy``."""
        mine = 0 if self.guard is None else self.guard.pop_nonfinite_steps()
        return max(self.world.all_gather_object(mine))

    def model_state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by the user's names."""
        return tensors_of(self._task.state_dict())

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters and buffers, all of them, by the user's names."""
        # Extra state is not among the tensors: fit.state loads it.
        missing = self._task.load_state_dict(state, strict=False).missing_keys
        lost = [name for name in missing if not is_extra(name)]
        if lost:
            raise KeyError(f"no values for {', '.join(lost)}")

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizers' state; see ``Strategy``."""
        return optimizer_state.optimizer_state(self.optimizers, self._task)

    def load_optimizer_state(
        self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], path: Path
    ) -> Callable[[], None]:
        """Return a function that loads a saved state; see ``Strategy``."""
        return optimizer_state.prepare_load(
            self.optimizers, self._task, tensors=tensors, plain=plain, path=path
        )


def _finalize_first(
    strategy: ModuleStrategy, grads: Sequence[list[Tensor]], *arguments: Any, **options: Any
) -> Tensor | None:
    """Finalize the gradients of the first step, which tell what all steps need."""
    strategy.choose_finalize(grads)
    return strategy._finalize(strategy, grads, *arguments, **options)
