"""Strategy: the interface between the loops and devices, ranks, precision, clipping and sharding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.distributed.communicator import Communicator
from loopkit.strategies.compile import Compile
from loopkit.strategies.precision import PRECISIONS, Precision


@dataclass(frozen=True)
class ComputeSettings:
    """What every strategy applies to the computation of a step; the options of Fit with these names.

    Attributes:
        precision: the dtypes of parameters, of operations and of the loss scaling.
        clip_norm, clip_value: the largest norm of all gradients, and of each element of them.
        on_nan: "raise", "skip" or "ignore" a step with a value that is not finite.
        compile: how to compile the steps; None does not.
        activation_checkpointing: which modules compute their activations again.
        batch_size: samples in a micro-batch on each device.
        accumulate: micro-batches per step.
        global_batch_size: samples in a step over all devices; None follows from the two above.
    """

    precision: Precision = PRECISIONS["fp32"]
    clip_norm: float | None = None
    clip_value: float | None = None
    on_nan: str = "raise"
    compile: Compile | None = None
    activation_checkpointing: str | None = None
    batch_size: int = 1
    accumulate: int = 1
    global_batch_size: int | None = None


class Strategy(ABC):
    """Where and how a task runs.

    The object that a user makes, such as ``DDP(...)``, describes a strategy. ``setup_environment``
    makes the attributes below; to read one earlier is an error. A strategy may be set up again for
    the next run.

    A loop written by hand calls ``setup_environment``, ``setup_module``, ``setup_optimizers`` and
    ``step_fn`` once. For each step it calls ``backward``, ``finalize_gradients``,
    ``optimizer_step`` and ``finish_step``, and at the end ``teardown``.

    Class attributes:
        multi_process: whether the strategy runs in several processes.
        sharded: whether each rank holds a part of the parameters and saves that part.
        collective_forward: whether a forward pass is collective, so that a rank without data must
            run one too.
        exposes_gradients: whether each parameter has a whole ``grad``, and the optimizers hold
            whole parameters, between ``backward`` and ``optimizer_step``. Hooks that read them are
            refused otherwise.

    Attributes:
        name: the name in checkpoints and on the console.
        device: the device of batches and, unless they are spread, of parameters.
        world: the communicator over all ranks.
        dp: the communicator over the data-parallel ranks. Ranks that train on the same samples are
            one member of it.
        rank, world_size: those of ``world``, for the hot path.
        settings: what ``setup_environment`` got.
        forward_context: the context for each call of a step; None for none. It can be entered many
            times.
        set_seed: seeds torch's generators, the device's included.
        init_context: returns the context in which ``Task.configure_model`` makes parameters.
        scaler: the loss scaler, with ``state_dict`` and ``load_state_dict``; None without one.
        optimizers: what ``setup_optimizers`` got, by name; empty before.
        finish_step: finishes a step; returns whether the host knows that a value was not finite.
            Where reading the flag would wait for the device, the step is counted there instead, and
            ``pop_nonfinite_steps`` reads the count later.
    """

    multi_process: bool = False
    sharded: bool = False
    collective_forward: bool = False
    exposes_gradients: bool = True

    name: str
    device: torch.device
    world: Communicator
    dp: Communicator
    rank: int
    world_size: int
    settings: ComputeSettings
    forward_context: AbstractContextManager[Any] | None
    set_seed: Callable[[int], object]
    init_context: Callable[[], AbstractContextManager[Any]]
    scaler: Any
    optimizers: dict[str, Optimizer]
    finish_step: Callable[[], bool]

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            kind = type(self).__name__
            if name in Strategy.__annotations__:
                raise AttributeError(
                    f"{kind}.{name} is unknown until setup_environment() is called"
                )
            raise AttributeError(f"{kind!r} object has no attribute {name!r}")

    @abstractmethod
    def setup_environment(self, settings: ComputeSettings | None = None) -> None:
        """Join the other ranks, if any, and take this rank's device.

        Args:
            settings: None takes the defaults.
        """

    @abstractmethod
    def setup_module(self, task: nn.Module) -> None:
        """Move the task to the device, wrapped or sharded as the strategy needs.

        The attributes of the task stay the user's.
        """

    @abstractmethod
    def setup_optimizers(self, optimizers: dict[str, Optimizer]) -> None:
        """Take the optimizers by name, which were made after ``setup_module``."""

    @abstractmethod
    def step_fn(self, name: str) -> Callable[..., Any]:
        """Return the function that calls the task's method ``name`` under this strategy."""

    @abstractmethod
    def set_gradient_sync(self, last: bool) -> None:
        """Say before a forward pass whether its backward pass is the last one of the step.

        Ranks sum gradients in the last one alone.
        """

    @abstractmethod
    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``.

        Args:
            loss: a scalar.
            value: the detached loss, if the caller has it.
        """

    @abstractmethod
    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Divide, unscale, check and clip the gradients, so that they are ready for the update.

        Args:
            names: the optimizers to make them ready for; None takes all.
            divisor: divides the gradients first.
            want_norm: return the norm even if nothing is clipped by it.

        Returns:
            The norm of all gradients before clipping, a scalar on the device, if gradients are
            clipped by their norm or ``want_norm``; else None.

        Raises:
            TaskError: there is no gradient.
        """

    @abstractmethod
    def optimizer_step(self, names: Sequence[str] | None = None) -> None:
        """Step the named optimizers (None: all) and clear their gradients."""

    @abstractmethod
    def pop_nonfinite_steps(self) -> int:
        """Return how many steps since the last call had a value that was not finite, on any rank.

        Collective. Reads the device.
        """

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """Return parameters and buffers by the user's names."""

    @abstractmethod
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Load parameters and buffers, all of them, by the user's names."""

    @abstractmethod
    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the optimizers' tensors, and the rest of their state as plain values by optimizer.

        The tensors have names of the form "<parameter>/<state>", which begin with "<optimizer>/" if
        there are several optimizers.
        """

    @abstractmethod
    def load_optimizer_state(
        self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], path: Path
    ) -> Callable[[], None]:
        """Compare a saved ``optimizer_state``, of any strategy, with these optimizers.

        Args:
            tensors: the tensors that ``optimizer_state`` returned.
            plain: the plain values that it returned.
            path: the checkpoint, for messages.

        Returns:
            A function that loads the state. Until it is called, nothing changes.

        Raises:
            CheckpointError: the optimizers or their parameter groups are not those that were saved.
        """

    # By default the last two do nothing.
    def reshard(self) -> None:  # noqa: B027
        """Shard again the parameters that forward passes without a backward pass have gathered."""

    def teardown(self, failed: bool = False) -> None:  # noqa: B027
        """End the run.

        Args:
            failed: the run ended with an error, perhaps on this rank alone, so that no collective
                may be issued.
        """
