"""The package deepspeed, brought in quietly, and its loss scaler as checkpoints keep it."""

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

# A part of a flat tensor cannot be stepped by what looks at a parameter's shape, or at all of its
# elements.
_OF_WHOLE = ("Adafactor", "Adagrad", "LBFGS", "Lamb", "LARS", "Muon", "SparseAdam")


class Scaler:
    """The state of DeepSpeed's loss scaler for fp16, as a checkpoint keeps it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def state_dict(self) -> dict[str, Any]:
        """Its scale and counts."""
        return {
            name: value
            for name, value in vars(self._inner).items()
            if isinstance(value, (int, float, bool))
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` gave; another strategy's scaler begins with the scale of
        this one.
        """
        for name, value in state.items():
            if name in vars(self._inner):
                setattr(self._inner, name, value)
        if "scale" in state:  # torch's GradScaler
            self._inner.cur_scale = state["scale"]


def import_deepspeed(device: torch.device, *, fp16: bool = False) -> Any:
    """The package deepspeed, told beforehand what it would otherwise find out by building or by
    warning.

    Raises:
        MissingExtraError: it is not installed.
        OptionError: it was imported for another kind of device, or finds no ``fp16`` on this one.
    """
    place = find_rank_info()
    os.environ.setdefault(
        "LOCAL_RANK", str(place.local_rank if place else 0)
    )  # it asks for this one
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls torch by names that are about to change, in every step: that is not the user's
    # to mend.
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise
        raise missing_extra("deepspeed", "deepspeed", "strategy='deepspeed'") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # which the import sets anew
    kind = deepspeed.accelerator.get_accelerator().device_name()
    if kind.split(":")[0] != device.type:
        raise OptionError(
            f"DeepSpeed runs on {kind!r} in this process, and the run on {device.type!r}: set the "
            f"environment variable DS_ACCELERATOR={device.type} before Python starts"
        )
    if fp16 and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
        raise OptionError(
            f"precision='fp16': DeepSpeed finds no fp16 on this {device.type}. Take 'bf16'"
        )
    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # gloo does; this is 45 s of a C++ compiler
        )
    return deepspeed


def single_optimizer(optimizers: Mapping[str, Optimizer]) -> tuple[str, Optimizer]:
    """The one optimizer there may be, and its name.

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
        kind.__name__ in _OF_WHOLE
        or kind.__module__.startswith("bitsandbytes")
        or schedule_free_optimizers(optimizers.values())
    ):
        raise OptionError(
            f"DeepSpeed steps parts of flat tensors, and {kind.__name__} needs each parameter "
            f"whole, "
            "or one that is its own. Take strategy='ddp' or 'fsdp', or an optimizer that treats "
            "elements alike, such as AdamW"
        )
    return name, optimizer


def check_parameters(task: nn.Module) -> None:
    """Refuse what stage 3 cannot shard.

    Raises:
        OptionError: with the first scalar parameter.
    """
    scalars = [name for name, p in task.named_parameters() if not len(full_shape(p))]
    if scalars:
        raise OptionError(
            f"the parameter {scalars[0]} has no dimension, and DeepSpeed's stage 3 cannot send "
            f"one: "
            "make it torch.ones(1), or take stage=2"
        )
