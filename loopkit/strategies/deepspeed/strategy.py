"""DeepSpeed: ZeRO's sharding of optimizer state, gradients and parameters, by DeepSpeed's own
engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.distributed.process_group import ProcessGroupSetup, broadcast_module
from loopkit.errors import DataError, TaskError
from loopkit.keywords import checks_keywords
from loopkit.strategies import optimizer_state
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.ddp import StepForward
from loopkit.strategies.deepspeed.config import (
    ZeroSettings,
    check_numerics,
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
from loopkit.strategies.deepspeed.zero_state import (
    AttributeSnapshot,
    ZeroState,
    full_shape,
    is_partitioned,
    skip_scalar_broadcast,
)
from loopkit.strategies.nonfinite import propagate_nonfinite
from loopkit.strategies.precision import Precision
from loopkit.strategies.single import SingleDevice

FP16 = Precision("fp16", storage=torch.float16, scaled=True)


@checks_keywords
class DeepSpeed(SingleDevice):
    """DeepSpeed's ZeRO: every rank keeps a part of the optimizer's state, of the gradients, or of
    everything.

    The task stays the user's: its attributes, parameter names and step methods. Checkpoints are
    loopkit's own, by parameter name and in single precision, and any strategy goes on from them.
    Gradients are not to be seen: what looks at them (``on_before_update``, GradMonitor, and hooks
    that follow the optimizer's parameters) is refused.

    Args:
        config: DeepSpeed's configuration, a dict or the path of a JSON file. "auto" takes Fit's
            value where Fit has one, and DeepSpeed's default elsewhere; a value that contradicts
            Fit's is an error.
        stage: what is sharded: 1 the optimizer's state, 2 gradients too, 3 parameters too. None
            takes the configuration's, or 2.
        offload_optimizer: keep the optimizer's state, and step, in the CPU's memory.
        offload_parameters: keep parameters in the CPU's memory too (stage 3).
        accelerator: "auto", "cpu" or "cuda"; each rank takes the device of its number on the
            machine.
        timeout: seconds that a rank waits for the others before the run is ended as hung.

    Raises:
        OptionError: a setting that is not accepted.
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
        super().__init__("cpu")  # until the place among the ranks is known
        self._join = ProcessGroupSetup(accelerator, timeout, always=True)
        self._settings = ZeroSettings(stage, offload_optimizer, offload_parameters)
        self._config = read_config(config)
        self.stage = choose_stage(self._config, self._settings)
        self.collective_forward = self.stage == 3
        self._engine: Any = None
        self._state: ZeroState | None = None

    def setup_environment(self, numerics: ComputeSettings | None = None) -> None:
        """Join the other ranks and take this one's device.

        Raises:
            OptionError: a precision or an option that DeepSpeed has not, or a contradiction to its
                configuration.
            MissingExtraError: deepspeed is not installed.
        """
        numerics = numerics or ComputeSettings()
        check_numerics(numerics, self.stage)
        self._take(*self._join.init())
        # DeepSpeed's fp16 has parameters of that type, no autocast, and a scaler of its own.
        fp16 = numerics.precision.name == "fp16"
        super().setup_environment(
            dataclasses.replace(numerics, precision=FP16) if fp16 else numerics
        )
        self.scaler = None
        pin = self.device.type == "cuda"
        self._whole_config = resolve(
            self._config, self._settings, numerics, self.world_size, pin=pin
        )
        self._deepspeed = import_deepspeed(self.device, fp16=fp16)
        self._deepspeed.init_distributed(
            auto_mpi_discovery=False, dist_init_required=False
        )  # takes ours
        if self.stage == 3:  # what configure_model makes is dealt out while it is made
            self.init_context = lambda: self._deepspeed.zero.Init(
                config_dict_or_path=self._whole_config
            )
        self._bad, self._skipped = 0, False
        self._divisor: float | None = None
        self._norm: Tensor | None = None

    def setup_module(self, task: nn.Module) -> None:
        """Move ``task`` to the device, with the first rank's weights on every rank; sharding comes
        with ``adopt``.

        Raises:
            TaskError: a run that failed has left it in parts.
        """
        if vars(task).get("_in_parts"):
            raise TaskError(
                "this task's parameters were left in parts by a run that failed: make a new one, "
                "with the "
                "weights of a checkpoint by its class's load()"
            )
        super().setup_module(task)
        broadcast_module(task, self.world)  # of what is in parts already nothing is sent

    def setup_optimizers(self, optimizers: dict[str, Optimizer]) -> None:
        """Take the optimizer, made over the placed parameters, into DeepSpeed's engine.

        Raises:
            OptionError: there are several, or one that cannot step parts of flat tensors.
        """
        self._name, optimizer = single_optimizer(optimizers)
        self.optimizers = optimizers
        names = {id(parameter): name for name, parameter in self._task.named_parameters()}
        self._held = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        self._start(optimizer)
        self._state = ZeroState(self._engine.optimizer, names, self.rank, self.world_size)
        if self.settings.precision.scaled:
            self.scaler = Scaler(self._engine.optimizer.loss_scaler)
        self._engine.set_gradient_accumulation_boundary(True)

    def _start(self, optimizer: Optimizer | None) -> None:
        """Wrap the task in an engine, which shards it.

        Raises:
            OptionError: stage 3 cannot shard a scalar.
        """
        if self.stage == 3:
            check_parameters(self._task)
        self._steps = StepForward()
        self._steps.task = self._task
        self._marks = AttributeSnapshot(self._steps)
        given = {"optimizer": optimizer} if optimizer is not None else {}
        with skip_scalar_broadcast(self._task):
            self._engine, *_ = self._deepspeed.initialize(
                model=self._steps, config=self._whole_config, dist_init_required=False, **given
            )

    def step_fn(self, name: str) -> Callable[..., Any]:
        """The task's method, through DeepSpeed's engine where it trains, and under stage 3 always."""
        own = super().step_fn(name)
        if self.stage != 3 and (self._engine is None or name in ("eval_step", "predict_step")):
            return own
        if self._engine is None:
            self._start(None)
        steps, engine = self._steps, self._engine
        steps.methods[name] = own
        return lambda batch: engine(name, batch)

    def set_gradient_sync(self, last: bool) -> None:
        """Say whether the backward pass to come is the last one before the update."""
        self._engine.set_gradient_accumulation_boundary(last)

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``, which are not finite on any rank if it is not."""
        self._engine.backward(propagate_nonfinite(loss), scale_wrt_gas=False)

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Note what ``update`` is to divide by, where DeepSpeed does all of this at once.

        Returns:
            Where gradients are clipped by their norm, a scalar that ``update`` fills with it.

        Raises:
            TaskError: the losses are weighted, under fp16's scaler.
            DataError: the weights of the step add up to nothing.
        """
        self._divisor = None
        if divisor is not None:
            if self.settings.precision.scaled:
                raise TaskError(
                    "train_step gives a 'weight', which is divided out of the gradients; "
                    "DeepSpeed's fp16 "
                    "scaler leaves no room for that. Take precision='bf16' or 'bf16-true', or "
                    "leave the "
                    "weight out"
                )
            self._divisor = float(divisor)
            if not self._divisor > 0:
                raise DataError(
                    f"the weights of this step add up to {self._divisor:g}: it has nothing to "
                    f"train on"
                )
        self._norm = torch.zeros(()) if self.settings.clip_norm is not None else None
        return self._norm

    def optimizer_step(self, names: Sequence[str] | None = None) -> None:
        """Clip, step the optimizer and clear the gradients; DeepSpeed leaves a step out that is not
        finite.
        """
        engine = self._engine
        scaler = engine.optimizer.loss_scaler
        if self._divisor is not None:
            scaler.cur_scale = (
                self._divisor
            )  # what gradients are divided by, and their norm is taken after
        try:
            engine.step()
        finally:
            if self._divisor is not None:
                scaler.cur_scale = 1.0
        self._skipped = not engine.was_step_applied()
        if self._norm is not None:
            self._norm.fill_(float(engine.get_global_grad_norm()))

    def finish_step(self) -> bool:
        """Whether the step was left out; under fp16 that is the scaler's everyday business."""
        bad, self._skipped = self._skipped and not self.settings.precision.scaled, False
        self._bad += bad
        return bad and self.settings.on_nan != "ignore"

    def pop_nonfinite_steps(self) -> int:
        """How many steps since last asked were left out, which all ranks know alike."""
        bad, self._bad = self._bad, 0
        return bad if self.settings.on_nan != "ignore" else 0

    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by the user's names; collective.

        Gathered ones, in single precision, are whole on the first rank and without memory on the
        others.
        """
        found: dict[str, Tensor] = {}
        known: dict[int, Tensor] = {}  # tied ones once
        for name, tensor in self._task.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                if id(tensor) not in known:
                    known[id(tensor)] = self._read(tensor)
                found[name] = known[id(tensor)]
        return found

    def _read(self, tensor: Any) -> Tensor:
        plain = not is_partitioned(tensor)
        state, exact = self._state, plain and tensor.dtype == torch.float32
        if state is not None and id(tensor) in state.parameters and not exact:
            return state.keep(state.weight(tensor))
        if plain:
            return tensor.detach()  # type: ignore[no-any-return]
        with self._deepspeed.zero.GatheredParameters([tensor]):
            whole = tensor.detach()
            return whole.cpu().clone() if self.rank == 0 else torch.empty_like(whole, device="meta")

    @torch.no_grad()
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back parameters and buffers, all of them, and the optimizer's copies; collective."""
        for name, tensor in self._task.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                continue
            value = state[name].to(self.device)
            if self._state is not None and id(tensor) in self._state.parameters:
                self._state.set_weight(tensor, value)
            if is_partitioned(tensor):
                with self._deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
                    tensor.copy_(value.reshape(full_shape(tensor)))
            else:
                tensor.copy_(value)

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizer's state by parameter, whole on the first rank; collective."""
        assert self._state is not None
        tensors, values = self._state.read()
        return tensors, {self._name: optimizer_state.about(self._state.base, self._held, values)}

    def load_optimizer_state(
        self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], path: Path
    ) -> Callable[[], None]:
        """What loads a saved state that fits; see ``Strategy.load_optimizer_state``."""
        state = self._state
        assert state is not None
        groups = optimizer_state.match_groups(self._name, state.base, self._held, plain, path)
        saved: dict[str, dict[str, Any]] = {}
        for parameter, key, value in optimizer_state.saved_states(
            "", tensors, plain[self._name]["values"]
        ):
            saved.setdefault(parameter, {})[key] = value
        state.compare(saved, path)

        def load() -> None:
            for group, match in zip(state.base.param_groups, groups):
                group.update({key: value for key, value in match.items() if key != "params"})
            state.write(saved)

        return load

    def reshard(self) -> None:
        """Give up whole parameters that an evaluation gathered; without a backward pass some stay."""
        if self._engine is not None and self.stage == 3:
            self._engine.empty_partition_cache()

    def teardown(self, failed: bool = False) -> None:
        """Give the task back, an ordinary module with whole parameters on every rank.

        Under stage 3 that is collective, and a task that fails is left in parts.
        """
        if self._engine is None:
            return
        whole = {}
        left = vars(self._task)["_in_parts"] = failed and self.stage == 3
        for parameter in self._task.parameters():
            if is_partitioned(parameter) and not left:
                with self._deepspeed.zero.GatheredParameters([parameter]):
                    whole[parameter] = parameter.data.clone()
        self._engine.destroy()
        self._engine = self._state = None
        if not left:
            self._marks.remove(self._steps)
        for parameter, tensor in whole.items():
            parameter.data = tensor
