"""DeepSpeed: its engine shards optimizer state, gradients and parameters (ZeRO)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.distributed.communicator import Communicator
from loopkit.distributed.process_group import ProcessGroupSetup, broadcast_module
from loopkit.errors import DataError, TaskError
from loopkit.keywords import checks_keywords
from loopkit.module_state import tensors_of
from loopkit.strategies import optimizer_state
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.collective_order import BACKWARD, CollectiveOrder
from loopkit.strategies.ddp import StepForward
from loopkit.strategies.deepspeed.config import (
    ZeroSettings,
    check_settings,
    choose_stage,
    read_config,
    resolve,
)
from loopkit.strategies.deepspeed.engine import (
    Scaler,
    check_parameters,
    import_deepspeed,
    single_optimizer,
)
from loopkit.strategies.deepspeed.zero_order import watched_order
from loopkit.strategies.deepspeed.zero_state import (
    AttributeSnapshot,
    ZeroState,
    full_shape,
    is_partitioned,
    skip_scalar_broadcast,
)
from loopkit.strategies.module_strategy import ModuleStrategy
from loopkit.strategies.nonfinite import NonFiniteGuard, propagate_nonfinite
from loopkit.strategies.precision import Precision

# DeepSpeed's fp16 keeps parameters in that dtype, without autocast.
_FP16 = Precision("fp16", storage=torch.float16, scaled=True)


@checks_keywords
class DeepSpeed(ModuleStrategy):
    """DeepSpeed's ZeRO: each rank keeps a part of optimizer state, gradients or everything.

    The task stays the user's: its attributes, parameter names and step methods. Checkpoints have
    loopkit's format, by parameter name and in single precision, and any strategy resumes from them.
    Gradients are not exposed, so hooks that read them (``on_before_update``, GradMonitor) or that
    follow the optimizer's parameters are refused.

    Args:
        config: DeepSpeed's configuration, a dict or the path of a JSON file. "auto" takes Fit's
            value if Fit has one, else DeepSpeed's default. A value that contradicts Fit's is an
            error.
        stage: what is sharded: 1 optimizer state, 2 gradients too, 3 parameters too. None takes
            that of the configuration, or 2.
        offload_optimizer: keep optimizer state, and step, in the CPU's memory.
        offload_parameters: keep parameters in the CPU's memory too (stage 3).
        accelerator: "auto", "cpu" or "cuda"; each rank takes the device of its local rank.
        timeout: seconds that a rank waits for the others before the run fails as hung.

    Raises:
        OptionError: a setting is not accepted.
    """

    multi_process = True
    exposes_gradients = False

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path | None = None,
        *,
        stage: int | None = None,
        offload_optimizer: bool = False,
        offload_parameters: bool = False,
        accelerator: str = "auto",
        timeout: float = 600,
    ) -> None:
        self._process_group = ProcessGroupSetup(accelerator, timeout, always=True)
        self._zero_settings = ZeroSettings(stage, offload_optimizer, offload_parameters)
        self._given_config = read_config(config)
        self.stage = choose_stage(self._given_config, self._zero_settings)
        self.collective_forward = self.stage == 3
        self._engine: Any = None
        self._order: CollectiveOrder | None = None
        self._last = True
        self._state: ZeroState | None = None

    def _join_ranks(self) -> tuple[torch.device, Communicator]:
        return self._process_group.init()

    def setup_environment(self, settings: ComputeSettings | None = None) -> None:
        """Join the other ranks and take this rank's device; see ``Strategy``.

        Raises:
            OptionError: DeepSpeed does not support a setting, or its configuration contradicts one.
            MissingExtraError: deepspeed is not installed.
        """
        # Stage 3 puts a function of its own there for good, which is wrong for complex weights.
        self._linear = torch.nn.functional.linear
        settings = settings or ComputeSettings()
        check_settings(settings, self.stage)
        fp16 = settings.precision.name == "fp16"
        super().setup_environment(
            dataclasses.replace(settings, precision=_FP16) if fp16 else settings
        )
        # DeepSpeed's engine has a scaler of its own.
        self.scaler = None
        self._config = resolve(
            self._given_config,
            self._zero_settings,
            settings,
            self.world_size,
            pin=self.device.type == "cuda",
        )
        self._deepspeed = import_deepspeed(self.device, fp16=fp16)
        # It uses the process group that torch has.
        self._deepspeed.init_distributed(auto_mpi_discovery=False, dist_init_required=False)
        if self.stage == 3:
            # Each parameter that configure_model makes is partitioned at once.
            self.init_context = lambda: self._deepspeed.zero.Init(config_dict_or_path=self._config)

    def setup_module(self, task: nn.Module) -> None:
        """Move ``task`` to the device, and give every rank the weights of rank 0.

        ``setup_optimizers`` shards it.

        Raises:
            TaskError: a run that failed has left the parameters partitioned.
        """
        if vars(task).get("_partitioned"):
            raise TaskError(
                "a run that failed has left this task's parameters partitioned over its ranks: make "
                "a new task, with the weights of a checkpoint by its class's load()"
            )
        super().setup_module(task)
        # A partitioned parameter has no elements to send.
        broadcast_module(task, self.world)

    def setup_optimizers(self, optimizers: dict[str, Optimizer]) -> None:
        """Take the optimizer into DeepSpeed's engine, which shards the task.

        Raises:
            OptionError: there are several optimizers, or the one cannot step parts of flat tensors.
        """
        self._name, optimizer = single_optimizer(optimizers)
        self.optimizers = optimizers
        names = {id(parameter): name for name, parameter in self._task.named_parameters()}
        self._group_names = [
            [names[id(p)] for p in group["params"]] for group in optimizer.param_groups
        ]
        self._start_engine(optimizer)
        self._state = ZeroState(self._engine.optimizer, names, self.rank, self.world_size)
        if self.settings.precision.scaled:
            self.scaler = Scaler(self._engine.optimizer.loss_scaler)
        self._engine.set_gradient_accumulation_boundary(True)
        # DeepSpeed finds values that are not finite and leaves the step out. The non-finite guard
        # counts these steps.
        self.guard = None
        if self.settings.on_nan != "ignore":
            self.guard = NonFiniteGuard(
                "skip", torch.device("cpu"), (), uniform=True, spans_ranks=True
            )

    def _start_engine(self, optimizer: Optimizer | None) -> None:
        """Wrap the task in an engine, which shards it.

        Raises:
            OptionError: stage 3 cannot shard a scalar.
        """
        if self.stage == 3:
            check_parameters(self._task)
        self._step_forward = StepForward(self._task)
        self._attributes = AttributeSnapshot(self._step_forward)
        given = {"optimizer": optimizer} if optimizer is not None else {}
        with skip_scalar_broadcast(self._task):
            self._engine, *_ = self._deepspeed.initialize(
                model=self._step_forward, config=self._config, dist_init_required=False, **given
            )
        if self.world_size > 1:
            self._order = watched_order(
                self._engine, self._task, self.world, self._process_group.timeout
            )

    def step_fn(self, name: str) -> Callable[..., Any]:
        """Return the task's method, called through DeepSpeed's engine if it trains.

        Under stage 3 the engine makes every call, because it gathers the parameters.
        """
        method = super().step_fn(name)
        if self.stage != 3 and (
            self._engine is None or name in ("eval_step", "test_step", "predict_step")
        ):
            return method
        if self._engine is None:
            self._start_engine(None)
        engine = self._engine
        self._step_forward.methods[name] = method
        order = self._order
        if order is None:
            return lambda batch: engine(name, batch)

        def call(batch: Any) -> Any:
            trains = torch.is_grad_enabled()
            order.start((name, trains, self._last))
            returned = engine(name, batch)
            if not trains:
                order.end()
            return returned

        return call

    def set_gradient_sync(self, last: bool) -> None:
        """Say whether the next backward pass is the last one before the update."""
        self._last = last
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``; if it is not finite, the gradients are not on any rank."""
        order = self._order
        if order is not None:
            order.follow(BACKWARD)
        self._engine.backward(propagate_nonfinite(loss), scale_wrt_gas=False)
        if order is not None:
            order.end()

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Keep the divisor for ``optimizer_step``, where DeepSpeed divides, checks and clips.

        Returns:
            A scalar that ``optimizer_step`` fills with the norm, if gradients are clipped by it.

        Raises:
            TaskError: the losses are weighted, under fp16's scaler.
            DataError: the sum of the weights is not above 0.
        """
        self._divisor: float | None = None
        if divisor is not None:
            if self.settings.precision.scaled:
                raise TaskError(
                    "train_step gives a 'weight', which is divided out of the gradients; "
                    "DeepSpeed's fp16 scaler leaves no room for that. Take precision='bf16' or "
                    "'bf16-true', or leave the weight out"
                )
            self._divisor = float(divisor)
            if not self._divisor > 0:
                raise DataError(
                    f"the weights of this step add up to {self._divisor:g}: it has nothing to "
                    "train on"
                )
        clips = self.settings.clip_norm is not None
        self._norm: Tensor | None = torch.zeros(()) if clips else None
        return self._norm

    def optimizer_step(self, names: Sequence[str] | None = None) -> None:
        """Clip, step the optimizer and clear the gradients.

        DeepSpeed leaves the step out if a gradient is not finite.
        """
        engine = self._engine
        scaler = engine.optimizer.loss_scaler
        if self._divisor is not None:
            # DeepSpeed divides gradients by the scale before it takes their norm.
            scaler.cur_scale = self._divisor
        try:
            engine.step()
        finally:
            if self._divisor is not None:
                scaler.cur_scale = 1.0
        # Under fp16 the scaler leaves steps out in the normal course of training.
        if self.guard is not None and not self.settings.precision.scaled:
            self.guard.raise_if(not engine.was_step_applied())
        if self._norm is not None:
            self._norm.fill_(float(engine.get_global_grad_norm()))

    def model_state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by the user's names; collective.

        Gathered tensors are in single precision, on the CPU of rank 0 and on the meta device of the
        other ranks.
        """
        found: dict[str, Tensor] = {}
        # A tied parameter is gathered once.
        gathered: dict[int, Tensor] = {}
        for name, tensor in tensors_of(self._task.state_dict(keep_vars=True)).items():
            if id(tensor) not in gathered:
                gathered[id(tensor)] = self._gather(tensor)
            found[name] = gathered[id(tensor)]
        return found

    def _gather(self, tensor: Any) -> Tensor:
        partitioned, state = is_partitioned(tensor), self._state
        is_exact = not partitioned and tensor.dtype == torch.float32
        if state is not None and id(tensor) in state.parameters and not is_exact:
            return state.keep(state.weight(tensor))
        if not partitioned:
            return tensor.detach()  # type: ignore[no-any-return]
        with self._deepspeed.zero.GatheredParameters([tensor]):
            whole = tensor.detach()
            return whole.cpu().clone() if self.rank == 0 else torch.empty_like(whole, device="meta")

    @torch.no_grad()
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters and buffers, all of them, and the optimizer's copies; collective."""
        for name, tensor in tensors_of(self._task.state_dict(keep_vars=True)).items():
            value = state[name].to(self.device)
            if self._state is not None and id(tensor) in self._state.parameters:
                self._state.set_weight(tensor, value)
            if is_partitioned(tensor):
                with self._deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                    tensor.copy_(value.reshape(full_shape(tensor)))
            else:
                tensor.copy_(value)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizer's state by parameter, whole on rank 0; collective."""
        assert self._state is not None
        tensors, values = self._state.read()
        described = optimizer_state.describe(self._state.base, self._group_names, values)
        return tensors, {self._name: described}

    def load_optimizer_state(
        self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], path: Path
    ) -> Callable[[], None]:
        """Return a function that loads a saved state; see ``Strategy``."""
        state = self._state
        assert state is not None
        groups = optimizer_state.match_groups(
            self._name, state.base, self._group_names, plain=plain, path=path
        )
        values = plain[self._name]["values"]
        saved: dict[str, dict[str, Any]] = {}
        for parameter, key, value in optimizer_state.saved_states("", tensors, values):
            saved.setdefault(parameter, {})[key] = value
        state.compare(saved, path)

        def load() -> None:
            for group, match in zip(state.base.param_groups, groups):
                group.update({key: value for key, value in match.items() if key != "params"})
            state.write(saved)

        return load

    def reshard(self) -> None:
        """Free whole parameters that an evaluation has gathered; some stay without a backward."""
        if self._engine is not None and self.stage == 3:
            self._engine.empty_partition_cache()

    def teardown(self, failed: bool = False) -> None:
        """Make the task an ordinary module again, with whole parameters on every rank.

        Under stage 3 this is collective. If the run ``failed``, parameters stay partitioned.
        """
        torch.nn.functional.linear = getattr(self, "_linear", torch.nn.functional.linear)
        if self._engine is None:
            return
        whole = {}
        stays = failed and self.stage == 3
        vars(self._task)["_partitioned"] = stays
        for parameter in self._task.parameters():
            if is_partitioned(parameter) and not stays:
                with self._deepspeed.zero.GatheredParameters([parameter]):
                    whole[parameter] = parameter.data.clone()
        self._engine.destroy()
        self._engine = self._state = self._order = None
        if not stays:
            self._attributes.remove(self._step_forward)
        for parameter, tensor in whole.items():
            parameter.data = tensor
