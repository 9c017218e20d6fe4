"""FSDP: ranks shard parameters, gradients and optimizer state (torch's fully_shard, FSDP2)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.checks import checked_int
from loopkit.distributed.communicator import Communicator, ProcessGroupCommunicator
from loopkit.distributed.gather import set_tp_size
from loopkit.distributed.process_group import ProcessGroupSetup, broadcast_module, device_mesh
from loopkit.errors import OptionError
from loopkit.keywords import checks_keywords
from loopkit.sharded import is_sharded, local_tensor, local_tensors
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.collective_order import BACKWARD
from loopkit.strategies.dtensor import (
    check_takes_parts,
    copy_into,
    leave_kernels,
    match_placements,
    replica_count,
    sum_of_squares,
)
from loopkit.strategies.fsdp_blocks import Wrap, blocks_to_shard, set_prefetch
from loopkit.strategies.fsdp_groups import FsdpGroups, watched_groups
from loopkit.strategies.meta_init import fill_from_rank_zero, is_on_meta, move_to_meta
from loopkit.strategies.module_strategy import ModuleStrategy
from loopkit.strategies.tensor_parallel import TensorParallel
from loopkit.strategies.unusual_gradients import refuse_complex


@checks_keywords
class FSDP(ModuleStrategy):
    """Fully sharded data parallel: each rank keeps a part of every parameter.

    The ranks gather the parameters of a block when they need them. The task is sharded in place
    and keeps its attributes, parameter names and step methods. Within a step parameters are whole;
    outside they are DTensors. Make a model that is too large for one device in
    ``Task.configure_model``: rank 0 makes it on the CPU, the others on the meta device.

    Args:
        accelerator: "auto", "cpu" or "cuda"; each rank takes the device of its local rank.
        wrap: what is gathered at once, besides the rest of the task as a whole. "auto" takes the
            blocks that are repeated in a ModuleList or Sequential; a number takes modules of at
            least so many parameters; a list takes classes, by themselves or by name.
        reshard_after_forward: free a block's whole parameters after its forward pass, and gather
            them again in the backward pass. False keeps them; a number keeps them whole within
            groups of that many ranks.
        param_dtype: the dtype in which parameters are gathered. None takes bfloat16 or float16
            under ``precision="bf16"`` or ``"fp16"``, else the dtype of the parameters.
        reduce_dtype: the dtype in which gradients are summed. None takes float32 under these two
            precisions, else the dtype of the parameters.
        offload: keep parameters, gradients and optimizer state in the CPU's memory.
        prefetch: how many blocks ahead parameters are gathered, forward and backward; None leaves
            that to torch.
        replicas: shard within groups of ranks, and replicate over this many groups (hybrid
            sharding).
        tensor: split layers over tensor-parallel groups too. Each group then trains on its own
            batches, and FSDP shards over the groups.
        timeout: seconds that a rank waits for the others before the run fails as hung.

    Raises:
        OptionError: a setting is not accepted.
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
        if isinstance(wrap, str) and wrap != "auto":
            raise OptionError(
                f"FSDP(wrap={wrap!r}): give 'auto', a number of parameters, or a list of classes"
            )
        checked_int(replicas, "FSDP(replicas=)")
        checked_int(prefetch, "FSDP(prefetch=)", or_none=True)
        self._process_group = ProcessGroupSetup(accelerator, timeout, always=True)
        self._groups: FsdpGroups | None = None
        self.wrap = wrap
        self.reshard_after_forward = reshard_after_forward
        self.param_dtype = param_dtype
        self.reduce_dtype = reduce_dtype
        self.offload = offload
        self.prefetch = prefetch
        self.replicas = replicas
        self.tensor = tensor

    def _join_ranks(self) -> tuple[torch.device, Communicator]:
        return self._process_group.init()

    def setup_environment(self, settings: ComputeSettings | None = None) -> None:
        """Join the other ranks and take this rank's device; see ``Strategy``.

        Raises:
            OptionError: the ranks cannot be divided into the groups that are asked for, or the
                layers are split under a loss scaler.
        """
        super().setup_environment(settings)
        self._groups, self._last = None, True
        self._tp_size = 1
        if self.tensor is not None:
            self._tp_size = self.tensor.tp_size(self.world_size, self._process_group.local_size)
            self.dp = ProcessGroupCommunicator(tp_size=self._tp_size)
            if self.scaler is not None:
                raise OptionError(
                    "TensorParallel with precision='fp16': the loss scaler takes no layers that "
                    "are split: take precision='bf16'"
                )
        set_tp_size(self._tp_size)
        if self.dp.size % self.replicas:
            members = "ranks"
            if self._tp_size > 1:
                members = f"tensor-parallel groups of {self._tp_size} ranks"
            raise OptionError(
                f"FSDP(replicas={self.replicas}): {self.dp.size} {members} cannot be divided evenly"
            )
        # If all ranks are one tensor-parallel group, their layers are split and not sharded.
        self._shards = self.dp.size > 1 or self._tp_size == 1
        if self._tp_size > 1:
            self.name = "FSDP and TensorParallel" if self._shards else "TensorParallel"
        if self.rank > 0:
            self.init_context = lambda: torch.device("meta")

    def setup_module(self, task: nn.Module) -> None:
        """Shard ``task`` in place, with the weights of rank 0; one that is sharded stays so."""
        self._task = task
        if not any(is_sharded(parameter) for parameter in task.parameters()):
            self._shard_from_rank_zero(task)
        if self._shards and self.world_size > 1:
            self._groups = watched_groups(
                task,
                self.world,
                self._process_group.timeout,
                compiles=self.settings.compile is not None,
            )

    def _shard_from_rank_zero(self, task: nn.Module) -> None:
        if any(self.world.all_gather_object(is_on_meta(task))):
            values = move_to_meta(task, self.settings.precision.storage)
            self._prepare_blocks(task)
            self._shard(task)
            home = torch.device("cpu") if self.offload else self.device
            fill_from_rank_zero(task, values if self.rank == 0 else {}, self.device, home)
        else:
            super().setup_module(task)
            broadcast_module(task, self.world)
            self._shard(task)

    def _shard(self, task: nn.Module) -> None:
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        # A mesh has an axis for each way to divide the ranks, named as torchtitan names them.
        sizes = {
            "dp_replicate": self.replicas,
            "dp_shard": self.dp.size // self.replicas,
            "tp": self._tp_size,
        }
        axes = tuple(
            n for n, size in sizes.items() if size > 1 or (n == "dp_shard" and self._shards)
        )
        shape = tuple(sizes[name] for name in axes)
        mesh = device_mesh(self.device.type, shape, axes)
        if self.tensor is not None and self._tp_size > 1:
            self.tensor.apply(task, mesh["tp"])
        if not self._shards:
            return
        if self._tp_size > 1:
            mesh = mesh[("dp_replicate", "dp_shard") if self.replicas > 1 else "dp_shard"]
        precision = self.settings.precision
        reduce_dtype = torch.float32 if precision.autocast is not None else None
        if (self.param_dtype or precision.autocast) is not None:
            reason = "FSDP would gather its real part alone"
            refuse_complex(task, f"precision={precision.name!r}", reason)
        offload: OffloadPolicy = OffloadPolicy()
        if self.offload:
            offload = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        settings: dict[str, Any] = {
            "mesh": mesh,
            "reshard_after_forward": self.reshard_after_forward,
            "mp_policy": MixedPrecisionPolicy(
                self.param_dtype or precision.autocast, self.reduce_dtype or reduce_dtype
            ),
            "offload_policy": offload,
            # fully_shard takes no scalars. They stay whole on every rank, and finalize_gradients
            # averages their gradients.
            "ignored_params": {p for p in task.parameters() if p.ndim == 0},
        }
        blocks = [
            block
            for block in blocks_to_shard(task, self.wrap)
            if any(p.ndim for p in block.parameters())
        ]
        for block in blocks:
            fully_shard(block, **settings)
        # A step needs the rest until its end, also after it has called the task itself.
        fully_shard(task, **{**settings, "reshard_after_forward": False})
        # torch warns if the task itself returns a view. The loss of the step around the call sees
        # to its gradients.
        warnings.filterwarnings(
            "ignore", message=rf"FSDP2-wrapped module \({type(task).__name__}\) returned a view"
        )
        if self.prefetch is not None:
            set_prefetch(blocks, self.prefetch)

    def teardown(self, failed: bool = False) -> None:
        """Stop watching the task, which stays sharded."""
        if self._groups is not None:
            self._groups.close()

    def setup_optimizers(self, optimizers: dict[str, Optimizer]) -> None:
        """Take the optimizers by name, without kernels of torch that take no sharded tensors.

        Raises:
            OptionError: an optimizer needs whole parameters.
        """
        for optimizer in optimizers.values():
            check_takes_parts(optimizer)
            leave_kernels(optimizer)
        if self._shards and len(optimizers) > 1:
            # torch settles the dtype of a module's gradients in the first forward pass, by the
            # parameters that are trained in it. A pass for one optimizer freezes those of the others.
            task: Any = self._task
            task._get_fsdp_state()._lazy_init()
        super().setup_optimizers(optimizers)

    def step_fn(self, name: str) -> Callable[..., Any]:
        """Return the task's method, inside which parameters are whole."""
        if self._shards and name not in vars(self._task):
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(self._task, name)
        method, groups = super().step_fn(name), self._groups
        if groups is None:
            return method

        def call(batch: Any) -> Any:
            trains = torch.is_grad_enabled()
            groups.order.start((name, trains, self._last))
            returned = method(batch)
            if not trains:
                groups.order.end()
            return returned

        return call

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``; see ``Strategy``."""
        groups = self._groups
        if groups is not None:
            groups.order.follow(BACKWARD)
        super().backward(loss, value)
        if groups is not None:
            groups.order.end()

    def set_gradient_sync(self, last: bool) -> None:
        """Sum gradients over the ranks in the next backward pass, or add them up on each rank."""
        task: Any = self._task
        self._last = last
        if self._shards:
            task.set_requires_gradient_sync(last)

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Make the gradients ready, by the part of each that this rank holds; see ``Strategy``."""
        names = names or tuple(self._parameters)
        groups, self._counts = self._groups, None
        if groups is not None:
            groups.fill_whole(p for n in names for p in self._parameters[n] if not is_sharded(p))
        held = [p for name in names for p in self._parameters[name] if p.grad is not None]
        whole = [p.grad for p in held if not is_sharded(p) and p.grad is not None]
        # The ranks of one tensor-parallel group have the same gradients already.
        for gradient in whole if self._shards else ():
            dist.all_reduce(gradient)
            gradient /= self.world_size
        if self._tp_size > 1:
            match_placements(held)
        sharded = [p for p in held if is_sharded(p)]
        parts = local_tensors(p.grad for p in sharded)
        norm = self._finalize(
            self,
            [parts, whole],
            names,
            divisor,
            want_norm=want_norm,
            reduce_norm=lambda: self._norm(sharded, parts, whole),
        )
        if groups is not None:
            if self._counts is None:  # no norm was wanted
                self._counts = groups.counts(self.device).clone()
                dist.all_reduce(self._counts)
            groups.drop_unused(self._counts)
        return norm

    def _norm(
        self, sharded: list[nn.Parameter], parts: list[Tensor], whole: list[Tensor]
    ) -> Tensor:
        """Return the norm of all gradients; a part that several ranks hold counts once.

        Args:
            sharded: the parameters of which this rank holds a part.
            parts: this rank's part of the gradient of each.
            whole: the gradients that every rank holds whole.
        """
        by_copies: dict[int, list[Tensor]] = {}
        for parameter, part in zip(sharded, parts):
            by_copies.setdefault(replica_count(parameter, self.world_size), []).append(part)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for count, alike in by_copies.items():
            total = total + sum_of_squares(alike, self.device) / count
        # In the same message the ranks say which parameters they used.
        counts = total.new_empty(0) if self._groups is None else self._groups.counts(self.device)
        message = torch.cat((total.reshape(1), counts))
        dist.all_reduce(message)
        total, self._counts = message[0], message[1:]
        total = total + sum_of_squares(whole, self.device)
        return total.sqrt().to((sharded or whole)[0].dtype.to_real())

    def reshard(self) -> None:
        """Shard again what an evaluation has gathered; without a backward pass torch does not."""
        from torch.distributed.fsdp import FSDPModule

        for module in self._task.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters and buffers, all of them: whole tensors, or sharded as the task's are."""
        for name, target in self.model_state().items():
            value = state[name]
            if is_sharded(value):
                local_tensor(target).copy_(local_tensor(value))
            else:
                copy_into(target, value)
