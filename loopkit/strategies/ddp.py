"""DDP: every rank has the whole task, and ranks average gradients while they are computed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loopkit.distributed.communicator import Communicator
from loopkit.distributed.process_group import ProcessGroupSetup, broadcast_module
from loopkit.errors import OptionError, TaskError
from loopkit.keywords import checks_keywords
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.module_strategy import ModuleStrategy

COMPRESSIONS = ("fp16", "bf16", "powersgd")


class StepForward(nn.Module):
    """The module that DistributedDataParallel wraps; its forward calls any method of the task."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.task = task
        self.methods: dict[str, Callable[..., Any]] = {}

    def forward(self, name: str, *arguments: Any) -> Any:
        """Call the method ``name``."""
        return self.methods[name](*arguments)


@checks_keywords
class DDP(ModuleStrategy):
    """Data parallel: every rank has the whole task and trains on its share of each step.

    torch's DistributedDataParallel averages the gradients. The gradient of a step is that of one
    big batch, also if shares differ: losses are weighted by samples, or by the weights that the
    task returns.

    Args:
        accelerator: "auto", "cpu" or "cuda"; each rank takes the device of its local rank.
        find_unused_parameters: look, in every forward pass, for parameters that the loss does not
            reach. None does so if the task has several optimizers, because a backward pass may
            reach the parameters of one alone.
        static_graph: promise that every step uses the same parameters, which saves the search.
        bucket_cap_mb: megabytes of gradients that are averaged together; None is torch's default.
        broadcast_buffers: give every rank the buffers of rank 0, such as running statistics, before
            each forward pass.
        gradient_as_bucket_view: let gradients be views of the buckets that are sent, which saves
            their memory once.
        compress: send gradients as "fp16" or "bf16", or as low-rank parts with "powersgd"; or one
            of torch's communication hooks, ``hook(state, bucket) -> Future[Tensor]``.
        timeout: seconds that a rank waits for the others before the run fails as hung.

    Raises:
        OptionError: the compression is unknown, or ``static_graph`` is given together with
            ``find_unused_parameters``.
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
        if compress is not None and not callable(compress) and compress not in COMPRESSIONS:
            raise OptionError(
                f"DDP(compress={compress!r}): give one of {', '.join(COMPRESSIONS)}, or a function"
            )
        if static_graph and find_unused_parameters:
            raise OptionError(
                "DDP(static_graph=True, find_unused_parameters=True): a static graph needs no "
                "search for unused parameters. Leave one of them out"
            )
        self._process_group = ProcessGroupSetup(accelerator, timeout)
        self._find_unused = find_unused_parameters
        self._static_graph = static_graph
        self._compress = compress
        self._options: dict[str, Any] = {
            "bucket_cap_mb": bucket_cap_mb,
            "broadcast_buffers": broadcast_buffers,
            "gradient_as_bucket_view": gradient_as_bucket_view,
            "static_graph": static_graph,
        }

    def _join_ranks(self) -> tuple[torch.device, Communicator]:
        return self._process_group.init()

    def setup_environment(self, settings: ComputeSettings | None = None) -> None:
        """Join the other ranks and take this rank's device; see ``Strategy``."""
        # Made by the first training step, so that what a hook froze at setup is frozen for
        # DistributedDataParallel too.
        self._wrapped: DistributedDataParallel | None = None
        super().setup_environment(settings)

    def setup_module(self, task: nn.Module) -> None:
        """Move ``task`` to the device, and give every rank the weights of rank 0."""
        super().setup_module(task)
        broadcast_module(task, self.world)
        self._step_forward = StepForward(task)

    def step_fn(self, name: str) -> Callable[..., Any]:
        """Return the task's method, called through DistributedDataParallel if it trains."""
        method = super().step_fn(name)
        if self.world_size == 1 or name in ("eval_step", "test_step", "predict_step"):
            return method
        wrapped = self._wrapped or self._wrap()
        self._step_forward.methods[name] = method

        def call(batch: Any) -> Any:
            return wrapped(name, batch)

        return call

    def _wrap(self) -> DistributedDataParallel:
        # DistributedDataParallel does not average what is frozen now and trained later.
        self._frozen = [
            p for parameters in self._parameters.values() for p in parameters if not p.requires_grad
        ]
        self._names = [name for name, p in self._task.named_parameters() if p.requires_grad]
        self._no_step_yet = True
        unused = len(self.optimizers) > 1 if self._find_unused is None else self._find_unused
        with warnings.catch_warnings():
            # torch 2.13 renames the argument; older versions know this name alone.
            warnings.filterwarnings(
                "ignore", message=".*broadcast_buffers.*", category=FutureWarning
            )
            wrapped = DistributedDataParallel(
                self._step_forward,
                device_ids=[self.device.index] if self.device.type == "cuda" else None,
                init_sync=False,
                find_unused_parameters=unused and not self._static_graph,
                **self._options,
            )
        if self._compress is not None:
            _register_compression(wrapped, self._compress)
        self._wrapped = wrapped
        return wrapped

    def set_gradient_sync(self, last: bool) -> None:
        """Average gradients in the next backward pass, or add them up on each rank."""
        if self._wrapped is not None:
            # torch must see a static graph whole once before it may leave anything out.
            sees_graph = self._static_graph and self._no_step_yet
            self._wrapped.require_backward_grad_sync = last or sees_graph
            self._no_step_yet = False

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Make the gradients ready, which are the same on all ranks; see ``Strategy``.

        Raises:
            TaskError: the loss did not reach each trainable parameter, which it names.
        """
        if self._wrapped is not None:
            self._check_reached(self._wrapped)
            late = [parameter for parameter in self._frozen if parameter.requires_grad]
            if late:
                self._average(late)
        return super().finalize_gradients(names, divisor, want_norm=want_norm)

    def _check_reached(self, wrapped: DistributedDataParallel) -> None:
        """Raise if a parameter has no gradient yet: other ranks may have one to average with it.

        torch finds that out in the next forward pass, which is after the update.
        """
        try:
            wrapped.reducer._check_reducer_finalized()
        except RuntimeError as error:
            found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            names = [self._names[int(index)] for index in found[1].split()] if found else []
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
            raise TaskError(
                f"the loss did not reach {shown or 'each trainable parameter'}: the ranks wait for "
                "the gradient of each. Pass strategy=DDP(find_unused_parameters=True), or freeze "
                "what is not used"
            ) from error

    def _average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients over the ranks; a rank without one counts as zeros."""
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=self.device)
        dist.all_reduce(used)
        for parameter, count in zip(parameters, used.tolist()):
            if count:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world_size

    def teardown(self, failed: bool = False) -> None:
        """Take DistributedDataParallel off the task."""
        self._wrapped = None


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
