"""What a LightningModule sees as its strategy and its logger."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from loopkit.errors import TaskError
from loopkit.loggers.base import Silent

if TYPE_CHECKING:
    from loopkit.interop.lightning.trainer import TrainerView
    from loopkit.run import Run


class LoggerView:
    """The run's loggers, as a LightningModule sees its logger.

    Attributes:
        experiment: the own object of the first logger that has one, TensorBoard's SummaryWriter
            for example. On other ranks than rank 0, what is called on it does nothing.
    """

    name = "loopkit"
    version = 0

    def __init__(self, run: Run) -> None:
        self._run = run
        self.save_dir = self.log_dir = str(run.run_dir) if run.run_dir else None

    @property
    def experiment(self) -> Any:
        """The own object of the first logger that has one."""
        if self._run.strategy.rank or not list(self._run.loggers):
            return Silent()
        found = [each for each in self._run.loggers if hasattr(type(each), "experiment")]
        if not found:
            raise TaskError(
                "the module uses logger.experiment, and no logger of this run has one: add "
                "'tensorboard' to Fit(loggers=), or the logger of a service"
            )
        return found[0].experiment

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Give numbers to the loggers, as a row of the current step."""
        self._run.publish({name: float(value) for name, value in metrics.items()})

    def log_hyperparams(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing: a run stores the module's hyperparameters itself."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the logger of a LightningTask has no {name!r}: it has experiment, log_metrics, "
            "log_hyperparams, name, version, save_dir and log_dir"
        )


class StrategyView:
    """What a module, and Lightning's own optimizer wrappers, use of the trainer's strategy."""

    def __init__(self, view: TrainerView) -> None:
        self._view = view
        self._lightning_optimizers: list[Any] = []

    @property
    def lightning_module(self) -> Any:
        """The module."""
        return self._view.lightning_module

    @property
    def root_device(self) -> torch.device:
        """The device of this rank."""
        return self._view.lightning_module.device  # type: ignore[no-any-return]

    def wrap(self, optimizers: list[Optimizer], wrapper: Any) -> None:
        """Wrap the optimizers for ``LightningModule.optimizers``."""
        self._view.optimizers = optimizers
        self._lightning_optimizers = [
            wrapper._to_lightning_optimizer(optimizer, self) for optimizer in optimizers
        ]

    def backward(self, loss: Tensor, optimizer: Any = None, *_: Any, **options: Any) -> None:
        """Add the gradients of a loss of manual optimization."""
        assert self._view.gradients is not None
        self._view.gradients.backward(loss, **options)

    def optimizer_step(
        self, optimizer: Optimizer, closure: Callable[[], Any], **options: Any
    ) -> Any:
        """Compute the gradients by ``closure``, and step one optimizer."""
        assert self._view.gradients is not None
        returned = closure()
        self._view.gradients.step(optimizer, **options)
        return returned

    def clip_gradients(
        self, optimizer: Optimizer, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm"
    ) -> None:
        """Clip the gradients of one optimizer, for ``LightningModule.clip_gradients``."""
        if not clip_val or clip_val <= 0:
            return
        assert self._view.gradients is not None
        self._view.gradients.reduce(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) == "value":
            torch.nn.utils.clip_grad_value_(parameters, clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, clip_val)

    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Return the tensors of all ranks, stacked; the tensor itself on one rank."""
        if _world_size() == 1:
            return tensor
        if sync_grads:
            from torch.distributed.nn.functional import all_gather

            return torch.stack(all_gather(tensor))  # type: ignore[no-untyped-call]
        parts = [torch.zeros_like(tensor) for _ in range(_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def reduce(self, tensor: Any, *_: Any, **__: Any) -> Any:
        """Return the tensor: what is logged is averaged over the ranks at the end of an epoch."""
        return tensor

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """Return the value of rank ``src``."""
        if _world_size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=src)
        return box[0]

    def barrier(self, name: str | None = None) -> None:
        """Wait for all ranks."""
        if _world_size() > 1:
            dist.barrier()


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
