"""Jobs on what happens to gradients between the backward pass and the optimizer's step."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from loopkit import DDP, FSDP, SingleDevice
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.device_map import DeviceMapStrategy
from loopkit.strategies.dtensor import full_tensor
from loopkit.strategies.precision import PRECISIONS
from tests.support import Tiny, points

MADE = {
    "single": lambda: SingleDevice("cpu"),
    "device_map": lambda: DeviceMapStrategy({"": "cpu"}),
    "ddp": lambda: DDP("cpu"),
    "fsdp": lambda: FSDP("cpu"),
}
STAGES = {
    "_foreach_div_": "divide",
    "_foreach_norm": "norm",
    "_foreach_mul_": "clip_norm",
    "_foreach_clamp_min_": "clip_value",
}


def set_up(strategy: str, **settings: Any) -> tuple[Any, Tiny]:
    """A strategy with a task and an optimizer, ready for a loop written by hand."""
    made, task = MADE[strategy](), Tiny(dropout=0.0)
    made.setup_environment(ComputeSettings(**settings))
    made.setup_module(task)
    made.setup_optimizers({"main": torch.optim.SGD(task.parameters(), lr=0.1)})
    return made, task


def stages(strategy: str, precision: str) -> list[str]:
    """The stages of finalize_gradients, in the order in which they ran."""
    made, _ = set_up(strategy, precision=PRECISIONS[precision], clip_norm=0.1, clip_value=0.01)
    made.backward(made.step_fn("train_step")(points(8)[:]))
    seen: list[str] = []

    def noting(stage: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if seen[-1:] != [stage]:
                seen.append(stage)
            return function(*args, **kwargs)

        return call

    made.guard.check = noting("check", made.guard.check)
    if made.scaler is not None:
        made.scaler.unscale_ = noting("unscale", made.scaler.unscale_)
    with mock.patch.multiple(
        torch, **{name: noting(stage, getattr(torch, name)) for name, stage in STAGES.items()}
    ):
        made.finalize_gradients(None, torch.tensor(2.0))
    made.teardown()
    return seen


def finished(strategy: str, **settings: Any) -> dict[str, torch.Tensor]:
    """The gradients of one step with a divisor, clipped in both ways, and their norm."""
    made, task = set_up(strategy, **settings)
    made.backward(made.step_fn("train_step")(points(8)[:]))
    norm = made.finalize_gradients(None, torch.tensor(2.0), want_norm=True)
    gradients = {name: full_tensor(p.grad).clone() for name, p in task.named_parameters()}
    assert not made.guard.losses
    made.teardown()
    return {**gradients, "norm": norm}


def no_gradient(strategy: str) -> str:
    """The error for a step whose loss reached nothing."""
    made, _ = set_up(strategy)
    try:
        made.finalize_gradients()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        made.teardown(failed=True)
    return ""


def two_losses(strategy: str, rank: int) -> dict[str, torch.Tensor]:
    """The weights after a step with two losses, of which the second is infinite on one rank.

    Both losses are backpropagated before the gradients of either optimizer are finished.
    """
    made, task = MADE[strategy](), Tiny(dropout=0.0)
    made.setup_environment(ComputeSettings(on_nan="skip"))
    made.setup_module(task)
    parts = {
        name: torch.optim.SGD(task.get_submodule(f"net.{number}").parameters(), lr=0.1)
        for name, number in (("first", 0), ("second", 3))
    }
    made.setup_optimizers(parts)
    step, batch = made.step_fn("train_step"), points(8)[:]
    for name, other in (("first", "second"), ("second", "first")):
        for group in parts[other].param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(False)
        loss = step(batch)
        made.backward(loss + float("inf") if name == "second" and made.rank == rank else loss)
        for group in parts[other].param_groups:
            for parameter in group["params"]:
                parameter.requires_grad_(True)
    for name in parts:
        made.finalize_gradients([name])
        made.optimizer_step([name])
    made.finish_step()
    weights = {name: full_tensor(t).clone() for name, t in made.model_state().items()}
    made.teardown()
    return weights
