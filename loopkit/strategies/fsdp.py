"""FSDP: parameters, gradients and optimizer state sharded over the ranks (torch's fully_shard,
FSDP2).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.checks import checked_int
from loopkit.distributed.communicator import ProcessGroupCommunicator
from loopkit.distributed.process_group import ProcessGroupSetup, broadcast_module
from loopkit.errors import OptionError
from loopkit.keywords import checks_keywords
from loopkit.strategies.activation_checkpointing import repeated_blocks
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.dtensor import align, copies, is_sharded, local, put
from loopkit.strategies.meta_init import fill_from_rank_zero, is_on_meta, move_to_meta
from loopkit.strategies.single import SingleDevice
from loopkit.strategies.tensor_parallel import TensorParallel

Wrap = Literal["auto"] | int | Sequence[str | type]


_FUSED = (torch.optim.Adam, torch.optim.AdamW)  # whose fused kernels know sharded tensors


@checks_keywords
class FSDP(SingleDevice):
    """Fully sharded data parallel: each rank keeps a part of every parameter, and gathers a block
    when it needs it.

    The task is sharded in place and stays the user's: its attributes, parameter names and step
    methods. Within a step parameters are whole; outside they are torch DTensors. A model that is
    too large for one device is made in ``Task.configure_model``: the first rank makes it on the
    CPU, the others not at all.

    Args:
        accelerator: "auto", "cpu" or "cuda"; each rank takes the device of its number on the
            machine.
        wrap: what is gathered at once, besides the rest of the task as a whole: "auto" takes the
            blocks that stand in a ModuleList or Sequential more than once, a number takes modules
            of at least so many parameters, a list takes classes, by themselves or by name.
        reshard_after_forward: free a block's whole parameters after its forward pass, and gather
            them again in the backward pass; False keeps them, a number keeps them whole within
            groups of that many ranks.
        param_dtype, reduce_dtype: the dtypes in which parameters are gathered and gradients are
            added up; None takes bfloat16 or float16 and float32 under ``precision="bf16"`` or
            ``"fp16"``, else the parameters'.
        offload: keep parameters, gradients and optimizer state in the CPU's memory.
        prefetch: how many blocks ahead are gathered, forward and backward; None leaves it to torch.
        replicas: shard within groups and replicate over this many of them (hybrid sharding).
        tensor: split layers over the ranks of a team too; then teams shard, and share out the data.
        timeout: seconds that a rank waits for the others before the run is ended as hung.

    Raises:
        OptionError: a setting that is not accepted.
    """

    multi_process = True
    collective_forward = True
    sharded = True

    def __init__(
        self,
        accelerator: str = "auto",
        *,
        wrap: Wrap = "auto",
        reshard_after_forward: bool | int = True,
        param_dtype: torch.dtype | None = None,
        reduce_dtype: torch.dtype | None = None,
        offload: bool = False,
        prefetch: int | None = None,
        replicas: int = 1,
        tensor: TensorParallel | None = None,
        timeout: float = 600,
    ) -> None:
        super().__init__("cpu")  # until the place among the ranks is known
        self._join = ProcessGroupSetup(accelerator, timeout, always=True)
        if isinstance(wrap, str) and wrap != "auto":
            raise OptionError(
                f"FSDP(wrap={wrap!r}): give 'auto', a number of parameters, or a list of classes"
            )
        checked_int(replicas, "FSDP(replicas=)")
        checked_int(prefetch, "FSDP(prefetch=)", or_none=True)
        self.wrap, self.reshard_after_forward, self.prefetch = wrap, reshard_after_forward, prefetch
        self.param_dtype, self.reduce_dtype = param_dtype, reduce_dtype
        self.offload, self.replicas, self.tensor = offload, replicas, tensor

    def setup_environment(self, numerics: ComputeSettings | None = None) -> None:
        """Join the other ranks and take this one's device."""
        self._take(*self._join.init())
        super().setup_environment(numerics)
        self._team = 1
        if self.tensor is not None:
            self._team = self.tensor.team(self.world_size, self._join.local_size)
            self.dp = ProcessGroupCommunicator(tp_size=self._team)
            if self.scaler is not None:
                raise OptionError(
                    "TensorParallel with precision='fp16': the loss scaler takes no layers that "
                    "are "
                    "split: take precision='bf16'"
                )
        if self.dp.size % self.replicas:
            whose = "ranks" if self._team == 1 else f"teams of {self._team} ranks"
            raise OptionError(
                f"FSDP(replicas={self.replicas}): {self.dp.size} {whose} cannot be dealt out evenly"
            )
        # Ranks that share no data with others only split layers.
        self._fully = self.dp.size > 1 or self._team == 1
        if self._team > 1:
            self.name = "FSDP and TensorParallel" if self._fully else "TensorParallel"
        # On the first rank a model is made on the CPU; on the others without memory, to be filled
        # from there.
        self.init_context = nullcontext if self.rank == 0 else lambda: torch.device("meta")

    def setup_module(self, task: nn.Module) -> None:
        """Shard ``task`` in place, with the first rank's weights; one that is sharded already stays
        so.
        """
        self._task = task
        if any(is_sharded(parameter) for parameter in task.parameters()):
            return
        if any(self.world.all_gather_object(is_on_meta(task))):
            full = move_to_meta(task, self.settings.precision.storage)
            self._equip(task)
            self._shard(task)
            home = torch.device("cpu") if self.offload else self.device
            fill_from_rank_zero(task, full if self.rank == 0 else {}, self.device, home)
        else:
            super().setup_module(task)
            broadcast_module(task, self.world)
            self._shard(task)

    def _shard(self, task: nn.Module) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        shape = {
            "replicate": self.replicas,
            "shard": self.dp.size // self.replicas,
            "tensor": self._team,
        }
        kept = {
            name: size
            for name, size in shape.items()
            if size > 1 or (name == "shard" and self._fully)
        }
        mesh = init_device_mesh(self.device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))
        if self.tensor is not None and self._team > 1:
            self.tensor.apply(task, mesh["tensor"])
        if not self._fully:
            return
        if self._team > 1:
            mesh = mesh[("replicate", "shard") if self.replicas > 1 else "shard"]
        precision = self.settings.precision
        reduce = torch.float32 if precision.autocast is not None else None
        policy = MixedPrecisionPolicy(
            self.param_dtype or precision.autocast, self.reduce_dtype or reduce
        )
        offload: Any = (
            CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.offload
            else OffloadPolicy()
        )
        # fully_shard takes no scalars: they stay whole on every rank, and their gradients are
        # averaged by ``complete``.
        scalars = {p for p in task.parameters() if p.ndim == 0}
        settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
        settings |= {"ignored_params": scalars, "reshard_after_forward": self.reshard_after_forward}
        blocks = [block for block in self._blocks(task) if any(p.ndim for p in block.parameters())]
        for block in blocks:
            fully_shard(block, **settings)
        # The rest is needed through the whole of a step: also after a call of the task itself
        # within it.
        fully_shard(task, **{**settings, "reshard_after_forward": False})
        # torch warns where the task itself gives a view; its gradients are seen to by the loss of
        # the step around it.
        warnings.filterwarnings(
            "ignore", message=rf"FSDP2-wrapped module \({type(task).__name__}\) returned a view"
        )
        self._look_ahead(blocks)

    def _blocks(self, task: nn.Module) -> list[nn.Module]:
        if self.wrap == "auto":
            found = [block for block in repeated_blocks(task) if block is not task]
        elif isinstance(self.wrap, int):
            found = [
                m
                for m in task.modules()
                if m is not task and sum(p.numel() for p in m.parameters()) >= self.wrap
            ]
        else:
            kinds = [kind if isinstance(kind, str) else kind.__name__ for kind in self.wrap]
            found = [m for m in task.modules() if type(m).__name__ in kinds and m is not task]
            missing = [kind for kind in kinds if kind not in {type(m).__name__ for m in found}]
            if missing:
                there = ", ".join(
                    sorted({type(m).__name__ for m in task.modules() if m is not task})
                )
                raise OptionError(
                    f"FSDP(wrap=...): no module is of class {missing[0]!r}; there are {there}"
                )
        # Inner modules first, as fully_shard wants them; a list or dict has no forward pass of its
        # own.
        return [m for m in reversed(found) if not isinstance(m, (nn.ModuleList, nn.ModuleDict))]

    def _look_ahead(self, blocks: list[Any]) -> None:
        if self.prefetch is None:
            return
        order = blocks[::-1]  # as the forward pass meets them
        for number, block in enumerate(order):
            block.set_modules_to_forward_prefetch(order[number + 1 : number + 1 + self.prefetch])
            block.set_modules_to_backward_prefetch(
                order[max(0, number - self.prefetch) : number][::-1]
            )

    def setup_optimizers(self, optimizers: dict[str, Optimizer]) -> None:
        """Take the optimizers, without torch's fused and foreach kernels where those do not take
        sharded tensors.

        Raises:
            OptionError: one that needs whole parameters.
        """
        for optimizer in optimizers.values():
            _refuse_whole(optimizer)
            for group in optimizer.param_groups:
                if len({getattr(p, "device_mesh", None) for p in group["params"]}) > 1:
                    group.update(
                        {key: False for key in ("fused", "foreach") if key in group}
                    )  # one mesh only
                elif group.get("fused") and type(optimizer) not in _FUSED:
                    group["fused"] = False
        super().setup_optimizers(optimizers)

    def step_fn(self, name: str) -> Callable[..., Any]:
        """The task's method, in which parameters are whole."""
        if self._fully and name not in vars(self._task):
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self._task, name)
        return super().step_fn(name)

    def set_gradient_sync(self, last: bool) -> None:
        """Add up gradients over the ranks in the backward pass to come, or leave them to add up on
        each.
        """
        task: Any = self._task
        if self._fully:
            task.set_requires_gradient_sync(last)

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Make the gradients ready, by the part of each that this rank holds."""
        names = names or tuple(self._parameters)
        held = [p for name in names for p in self._parameters[name] if p.grad is not None]
        own = [p.grad for p in held if not is_sharded(p) and p.grad is not None]
        for gradient in own if self._fully else ():  # a team's ranks have the same
            dist.all_reduce(gradient)
            gradient /= self.world_size
        if self._team > 1:
            align(held)
        sharded = [p for p in held if is_sharded(p)]
        return self._finalize(
            [[local(p.grad) for p in sharded], own],
            names,
            divisor,
            want_norm=want_norm,
            reduce_norm=lambda: self._norm(sharded, own),
        )

    def _norm(self, sharded: list[nn.Parameter], own: list[Tensor]) -> Tensor:
        """The norm of all gradients, from each rank's parts; what several ranks have alike counts
        once.
        """
        alike: dict[int, list[Tensor]] = {}
        for parameter in sharded:
            alike.setdefault(copies(parameter, self.world_size), []).append(local(parameter.grad))
        total = sum(
            (_squares(parts, self.device) / count for count, parts in alike.items()),
            _squares([], self.device),
        )
        dist.all_reduce(total)
        total = total + _squares(own, self.device)
        return total.sqrt().to((sharded or own)[0].dtype)

    def reshard(self) -> None:
        """Shard again what an evaluation gathered; without a backward pass nobody else does."""
        from torch.distributed.fsdp import FSDPModule

        for module in self._task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back parameters and buffers, all of them: whole tensors, or sharded ones like the
        task's.
        """
        for name, target in self.model_state().items():
            value = state[name]
            if is_sharded(value):
                local(target).copy_(local(value))
            else:
                put(target, value)


def _refuse_whole(optimizer: Optimizer) -> None:
    kind = type(optimizer)
    if kind.__name__ == "Adafactor" or kind.__module__.split(".")[0] == "bitsandbytes":
        raise OptionError(
            f"{kind.__name__} needs each parameter whole, and under FSDP and TensorParallel a rank "
            f"holds "
            "parts of them: take another optimizer (adamw, lion, muon), or strategy='ddp'"
        )


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(torch._foreach_norm(tensors)).to(device).double().square().sum()
