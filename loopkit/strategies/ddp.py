"""DDP: the task whole on every rank, gradients averaged while they are computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loopkit.distributed.process_group import ProcessGroupSetup, broadcast_module
from loopkit.errors import OptionError, TaskError
from loopkit.keywords import checks_keywords
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.single import SingleDevice

COMPRESSIONS = ("fp16", "bf16", "powersgd")


class StepForward(nn.Module):
    """What DistributedDataParallel wraps: its forward is any method of the task, which stays the
    user's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.methods: dict[str, Callable[..., Any]] = {}

    def forward(self, name: str, *arguments: Any) -> Any:
        """Call the task's method ``name``."""
        return self.methods[name](*arguments)


@checks_keywords
class DDP(SingleDevice):
    """Data parallel: every rank has the whole task, trains on its share of each step, and averages
    gradients.

    The gradient of a step is that of one big batch, whatever the shares: each rank's loss is
    weighted by its samples, or by the weights that the task returns. torch's
    DistributedDataParallel does the averaging.

    Args:
        accelerator: "auto", "cpu" or "cuda"; each rank takes the device of its number on the
            machine.
        find_unused_parameters: look, in every forward pass, for parameters that the loss does not
            reach. None does so where the task has several optimizers, which each backward pass
            feeds only one of.
        static_graph: promise that every step uses the same parameters, which saves looking.
        bucket_cap_mb: megabytes of gradients that are averaged together; None is torch's default.
        broadcast_buffers: give every rank the first one's buffers (running statistics) before each
            forward pass.
        gradient_as_bucket_view: let gradients lie in the buckets that are sent, which saves their
            memory once.
        compress: send gradients as "fp16" or "bf16", or as low-rank parts with "powersgd"; or a
            communication hook of torch's, ``hook(state, bucket) -> Future[Tensor]``.
        timeout: seconds that a rank waits for the others before the run is ended as hung.

    Raises:
        OptionError: a compression that is not known, or ``static_graph`` together with looking for
            unused parameters.
    """

    multi_process = True

    def __init__(
        self,
        accelerator: str = "auto",
        *,
        find_unused_parameters: bool | None = None,
        static_graph: bool = False,
        bucket_cap_mb: float | None = None,
        broadcast_buffers: bool = True,
        gradient_as_bucket_view: bool = False,
        compress: Literal["fp16", "bf16", "powersgd"] | Callable[..., Any] | None = None,
        timeout: float = 600,
    ) -> None:
        super().__init__("cpu")  # until the place among the ranks is known
        self._join = ProcessGroupSetup(accelerator, timeout)
        if compress is not None and not callable(compress) and compress not in COMPRESSIONS:
            raise OptionError(
                f"DDP(compress={compress!r}): give one of {', '.join(COMPRESSIONS)}, or a function"
            )
        if static_graph and find_unused_parameters:
            raise OptionError(
                "DDP(static_graph=True, find_unused_parameters=True): a graph that stays the same "
                "needs "
                "no looking: leave one of them out"
            )
        self._find_unused = find_unused_parameters
        self._static = static_graph
        self._compress = compress
        self._settings: dict[str, Any] = {
            "bucket_cap_mb": bucket_cap_mb,
            "broadcast_buffers": broadcast_buffers,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "static_graph": static_graph,
        }
        self._wrapped: DistributedDataParallel | None = None
        self._steps = StepForward()
        self._first = True
        self._late: list[nn.Parameter] = []

    def setup_environment(self, numerics: ComputeSettings | None = None) -> None:
        """Join the other ranks and take this one's device."""
        self._take(*self._join.init())
        super().setup_environment(numerics)
        self._wrapped, self._steps, self._first = None, StepForward(), True

    def setup_module(self, task: nn.Module) -> None:
        """Move ``task`` to the device, with the first rank's weights on every rank."""
        super().setup_module(task)
        broadcast_module(task, self.world)

    def step_fn(self, name: str) -> Callable[..., Any]:
        """The task's method, through DistributedDataParallel where it trains."""
        own = super().step_fn(name)
        if self.world_size == 1 or name in ("eval_step", "predict_step"):
            return own
        # Wrapped only now, so that what a hook froze at setup is frozen for DistributedDataParallel
        # too.
        steps, wrapped = self._steps, self._wrapped or self._wrap()
        steps.methods[name] = own

        def call(batch: Any) -> Any:
            try:
                return wrapped(name, batch)
            except RuntimeError as error:
                if "Expected to have finished reduction" in str(error):
                    raise TaskError(
                        "the loss of the step before did not reach every trainable parameter, "
                        "which the "
                        "ranks wait for: pass strategy=DDP(find_unused_parameters=True), or freeze "
                        "what "
                        "is not used"
                    ) from error
                raise

        return call

    def _wrap(self) -> DistributedDataParallel:
        # What is frozen now is not known to DistributedDataParallel when it moves later.
        self._late = [
            p for parameters in self._parameters.values() for p in parameters if not p.requires_grad
        ]
        unused = len(self.optimizers) > 1 if self._find_unused is None else self._find_unused
        ids = [self.device.index] if self.device.type == "cuda" else None
        self._steps.task = self._task
        with warnings.catch_warnings():
            # Renamed in torch 2.13, where both names are known; older versions know this one.
            warnings.filterwarnings(
                "ignore", message=".*broadcast_buffers.*", category=FutureWarning
            )
            self._wrapped = wrapped = DistributedDataParallel(
                self._steps,
                device_ids=ids,
                init_sync=False,
                find_unused_parameters=unused and not self._static,
                **self._settings,
            )
        if self._compress is not None:
            _register_compression(wrapped, self._compress)
        return wrapped

    def teardown(self, failed: bool = False) -> None:
        """Leave the gradients to themselves."""
        self._wrapped = None

    def set_gradient_sync(self, last: bool) -> None:
        """Average the gradients in the backward pass to come, or leave them to add up."""
        if self._wrapped is not None:
            # A static graph must be seen whole once before anything may be left out of it.
            self._wrapped.require_backward_grad_sync = last or (self._static and self._first)
            self._first = False

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Divide, unscale, clip and check the gradients, which are the same on all ranks."""
        for parameter in self._late:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size
        return super().finalize_gradients(names, divisor, want_norm=want_norm)


def _register_compression(
    wrapped: DistributedDataParallel, compress: str | Callable[..., Any]
) -> None:
    """Register the communication hook that ``compress`` names, or the hook that it is."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    if callable(compress):
        wrapped.register_comm_hook(None, compress)
    elif compress == "fp16":
        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    elif compress == "bf16":
        # torch compares a hook's annotations, which are strings in this file: a lambda has none.
        wrapped.register_comm_hook(None, lambda state, bucket: _average_in_bf16(bucket))
    else:
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=2, start_powerSGD_iter=10
        )
        wrapped.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def _average_in_bf16(bucket: Any) -> torch.futures.Future[Tensor]:
    """Average a bucket of gradients in bfloat16; torch's own such hook needs NCCL."""
    buffer = bucket.buffer()
    # Divided before the sum, so that it cannot overflow where the gradients did not.
    halves = buffer.to(torch.bfloat16).div_(dist.get_world_size())
    work: Any = dist.all_reduce(halves, async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(
        lambda done: buffer.copy_(done.value()[0])
    )
    return future
