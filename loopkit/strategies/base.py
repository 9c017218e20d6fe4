"""Strategy: the only code that knows devices, processes, wrapping, loss scaling, clipping and
sharded state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loopkit.distributed.communicator import Communicator
from loopkit.strategies.compile import Compile
from loopkit.strategies.precision import PRECISIONS, Precision


@dataclass(frozen=True)
class ComputeSettings:
    """What every strategy must do to the numbers, and how: precision, clipping, non-finite ones,
    memory for time.

    The sizes are Fit's: what each device takes at once, how often for one step, and for a step on
    all devices.
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
    """Where and how a task runs. Usable alone, in a hand-written loop: place, method, backward,
    update.

    Attributes:
        name: what it is called in checkpoints and on the console.
        device: where batches and parameters are.
        world: those who train together; ``rank`` and ``world_size`` are its, at hand for the hot
            path.
        data: the same as seen by the data: ranks that train on the same samples are one member.
        joins: whether it takes several processes.
        sharded: whether parameters are spread over the ranks, which then save together.
        exposes_gradients: whether parameters, their gradients and the optimizers' state are whole and
            at hand between backward and update; what looks at them is refused where they are not.
        lockstep: whether a forward pass is collective, so that a rank without data must run it too.
        forward: the context that every call of a task's step runs in; None for none.
        seed: seeds torch's generators, this device's among them.
        scaler: the loss scaler, with ``state_dict`` and ``load_state_dict``; None where nothing is
            scaled.
        optimizers: what ``adopt`` was given, by name.
        building: gives the context in which ``Task.configure_model`` makes its parameters.
    """

    name: str = "Strategy"
    device: torch.device
    world: Communicator = Communicator()
    dp: Communicator = Communicator()
    rank: int = 0
    world_size: int = 1
    multi_process: bool = False
    sharded: bool = False
    exposes_gradients: bool = True
    collective_forward: bool = False
    settings: ComputeSettings
    forward_context: AbstractContextManager[Any] | None
    set_seed: Callable[[int], object]
    scaler: Any = None
    optimizers: dict[str, Optimizer]
    init_context: Callable[[], AbstractContextManager[Any]]

    @abstractmethod
    def setup_environment(self, numerics: ComputeSettings) -> None:
        """Join the other processes, if any, and take the device."""

    @abstractmethod
    def setup_module(self, task: nn.Module) -> None:
        """Bring the task to the device, wrapped or sharded as need be; its attributes stay the
        user's.
        """

    @abstractmethod
    def setup_optimizers(self, optimizers: dict[str, Optimizer]) -> None:
        """Take the optimizers, made over the placed parameters."""

    @abstractmethod
    def step_fn(self, name: str) -> Callable[..., Any]:
        """The task's method ``name`` as this strategy runs it."""

    @abstractmethod
    def set_gradient_sync(self, last: bool) -> None:
        """Say, before a forward pass, whether its backward completes the gradients of this step."""

    @abstractmethod
    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``, a scalar; ``value`` is its detached self, for callers who
        have it.
        """

    @abstractmethod
    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Make the gradients of the named optimizers (None: of all) ready: divided, unscaled,
        clipped, checked.

        Returns:
            The total norm before clipping, a scalar on the device, where it is clipped by or
            wanted; else None.
        """

    @abstractmethod
    def optimizer_step(self, names: Sequence[str] | None = None) -> None:
        """Step the named optimizers (None: all) and clear their gradients."""

    @abstractmethod
    def finish_step(self) -> bool:
        """Finish a step; return whether the host knows already that a value was not finite.

        Where reading the flag would wait for the device, the step is counted there instead, and
        ``pop_nonfinite_steps`` reads the count later.
        """

    @abstractmethod
    def pop_nonfinite_steps(self) -> int:
        """How many steps since last asked had a loss or gradient that is not finite; reads the
        device.
        """

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """Parameters and buffers by the user's names."""

    @abstractmethod
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back parameters and buffers, all of them."""

    @abstractmethod
    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The optimizers' tensors by "<parameter>/<state>", by the user's names, and the rest as
        plain values.

        With several optimizers the first part is preceded by the optimizer's name.
        """

    @abstractmethod
    def load_optimizer_state(
        self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any], path: Path
    ) -> Callable[[], None]:
        """Compare what ``optimizer_state`` gave, under any strategy, with these optimizers; nothing
        changes yet.

        Returns:
            What loads it.

        Raises:
            CheckpointError: the optimizers or their groups are not those that were saved in
                ``path``.
        """

    @abstractmethod
    def reshard(self) -> None:
        """Forward passes without a backward are over: parameters are to be as before them."""

    @abstractmethod
    def teardown(self, failed: bool = False) -> None:
        """The run is over. Where it ``failed``, perhaps on this rank alone, no collective may be
        issued.
        """
