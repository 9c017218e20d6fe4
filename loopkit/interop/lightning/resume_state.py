"""The state of a LightningTask that is in no module: schedulers, metric objects, save hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.checkpoint.codecs import encode
from loopkit.distributed.communicator import Communicator
from loopkit.errors import CheckpointError
from loopkit.interop.lightning.calls import ModuleCalls


def adapter_state(calls: ModuleCalls, dp: Communicator) -> dict[str, Any]:
    """Return everything that a resume needs and no module has. Every rank calls it."""
    view, module = calls.view, calls.module
    saved = _checkpoint(calls)
    given = set(saved)
    module.on_save_checkpoint(saved)
    callbacks: dict[str, Any] = {}
    for key, callback in _callbacks(calls):
        callback.on_save_checkpoint(view, module, saved)
        callbacks[key] = callback.state_dict()
    return {
        "log": view.log.state_dict(dp.all_gather_object),
        "schedulers": view.schedulers.state_dict(),
        "optimizer_steps": view.optimizer_steps,
        "module": {key: value for key, value in saved.items() if key not in given},
        "callbacks": callbacks,
        "datamodule": calls.data.state_dict(),
        "gradients": _gradients_of(module, dp),
    }


def restore(calls: ModuleCalls, state: Mapping[str, Any], dp: Communicator) -> None:
    """Give everything the state that ``adapter_state`` returned."""
    view, module = calls.view, calls.module
    view.log.load_state_dict(state["log"], dp.rank, dp.size)
    view.schedulers.load_state_dict(state["schedulers"])
    view.optimizer_steps = state["optimizer_steps"]
    calls.data.load_state_dict(state["datamodule"])
    checkpoint = {**_checkpoint(calls), **state["module"]}
    module.on_load_checkpoint(checkpoint)
    for key, callback in _callbacks(calls):
        callback.on_load_checkpoint(view, module, checkpoint)
        if state["callbacks"].get(key):
            callback.load_state_dict(state["callbacks"][key])
    _load_gradients(module, state["gradients"], dp)


def check_saveable(state: Any) -> None:
    """Refuse state that a checkpoint cannot hold.

    Raises:
        CheckpointError: naming the value.
    """
    try:
        encode(state, "LightningTask", {})
    except TypeError as error:
        raise CheckpointError(
            f"this run cannot be saved: {error} It comes from on_save_checkpoint, a state_dict of "
            "a callback, of the data module or of a scheduler"
        ) from error


def _checkpoint(calls: ModuleCalls) -> dict[str, Any]:
    """Return what save and load hooks find in a checkpoint."""
    return {
        "epoch": calls.view.current_epoch,
        "global_step": calls.view.global_step,
        "state_dict": calls.module.state_dict(),
    }


def _callbacks(calls: ModuleCalls) -> list[tuple[str, Any]]:
    """Return the callbacks by the key of their state: number and class."""
    return [(f"{n} {type(each).__name__}", each) for n, each in enumerate(calls.view.callbacks)]


def _gradients_of(module: nn.Module, dp: Communicator) -> list[dict[str, Tensor]]:
    """Return the gradients of each rank that a manual optimization has not used yet."""
    own = {
        name: parameter.grad.detach().cpu()
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and type(parameter.grad) is Tensor
    }
    return dp.all_gather_object(own)


def _load_gradients(module: nn.Module, saved: list[dict[str, Tensor]], dp: Communicator) -> None:
    """Give parameters the gradients of this rank; those of another number of ranks are averaged."""
    parts = [saved[dp.rank]] if len(saved) == dp.size else saved
    for name, parameter in module.named_parameters():
        found = [part[name].to(parameter.device) for part in parts if name in part]
        if found:
            parameter.grad = (torch.stack(found).sum(0) / len(parts)).to(parameter.dtype)
