"""The package deepspeed: imported without noise, what its engine accepts, and its loss scaler."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from loopkit.distributed.environment import find_rank_info
from loopkit.errors import OptionError, missing_extra
from loopkit.optim.schedule_free import schedule_free_optimizers
from loopkit.strategies.deepspeed.zero_state import full_shape

# Optimizers that use a parameter's shape, or all elements of it at once. They cannot step a part of
# a flat tensor.
_NEED_WHOLE = ("Adafactor", "Adagrad", "LBFGS", "Lamb", "LARS", "Muon", "SparseAdam")


class Scaler:
    """The state of DeepSpeed's loss scaler for fp16, as a checkpoint keeps it."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the counts."""
        return {
            name: value
            for name, value in vars(self._scaler).items()
            if isinstance(value, (int, float, bool))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned, or take the scale of torch's GradScaler."""
        for name, value in state.items():
            if name in vars(self._scaler):
                setattr(self._scaler, name, value)
        # The name that torch's GradScaler uses.
        if "scale" in state:
            self._scaler.cur_scale = state["scale"]


def import_deepspeed(device: torch.device, *, fp16: bool = False) -> Any:
    """Return the package deepspeed, imported for ``device``.

    The environment is set first, because the import would otherwise build code or print warnings.

    Raises:
        MissingExtraError: it is not installed.
        OptionError: it was imported for another kind of device, or has no ``fp16`` on this one.
    """
    rank_info = find_rank_info()
    os.environ.setdefault("LOCAL_RANK", str(rank_info.local_rank if rank_info else 0))
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # In every step DeepSpeed calls functions of torch by deprecated names, which no user can mend.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise missing_extra("deepspeed", "deepspeed", "strategy='deepspeed'") from error
    # The import has set the level again.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    accelerator = deepspeed.accelerator.get_accelerator()
    kind = accelerator.device_name()
    if kind.split(":")[0] != device.type:
        raise OptionError(
            f"DeepSpeed runs on {kind!r} in this process, and the run on {device.type!r}: set the "
            f"environment variable DS_ACCELERATOR={device.type} before Python starts"
        )
    if fp16 and not accelerator.is_fp16_supported():
        raise OptionError(
            f"precision='fp16': DeepSpeed finds no fp16 on this {device.type}. Take 'bf16'"
        )
    if device.type == "cpu":
        # gloo does the same, without 45 s of a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def single_optimizer(optimizers: Mapping[str, Optimizer]) -> tuple[str, Optimizer]:
    """Return the one optimizer that DeepSpeed steps, and its name first.

    Raises:
        OptionError: there are several, or it cannot step parts of flat tensors.
    """
    if len(optimizers) != 1:
        raise OptionError(
            f"DeepSpeed steps one optimizer, and the task gives {len(optimizers)}: "
            f"{', '.join(optimizers)}. Take strategy='ddp' or 'fsdp'"
        )
    ((name, optimizer),) = optimizers.items()
    kind = type(optimizer)
    if (
        kind.__name__ in _NEED_WHOLE
        or kind.__module__.startswith("bitsandbytes")
        or schedule_free_optimizers(optimizers.values())
    ):
        raise OptionError(
            f"DeepSpeed steps parts of flat tensors, and {kind.__name__} needs each parameter "
            "whole, or one that is its own. Take strategy='ddp' or 'fsdp', or an optimizer that "
            "treats elements alike, such as AdamW"
        )
    return name, optimizer


def check_parameters(task: nn.Module) -> None:
    """Refuse parameters that stage 3 cannot shard.

    Raises:
        OptionError: a parameter is a scalar.
    """
    scalars = [name for name, p in task.named_parameters() if not len(full_shape(p))]
    if scalars:
        raise OptionError(
            f"the parameter {scalars[0]} has no dimension, and DeepSpeed's stage 3 cannot send "
            "one: make it torch.ones(1), or take stage=2"
        )
