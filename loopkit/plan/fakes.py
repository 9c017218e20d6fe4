"""Tasks and batches of fake tensors: tensors with a shape and a dtype, and no memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary

from loopkit.data.batches import map_batch
from loopkit.sharded import local_tensor


@contextmanager
def fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """Inside, a parameter loses its memory when a module gets it.

    So one layer at a time is in memory, whatever the size of the model. Other tensors that a
    constructor makes stay real, such as its data.
    """

    made: Any = WeakIdKeyDictionary()  # modules may share a parameter

    def replace(module: nn.Module, name: str, parameter: Any) -> Any:
        if parameter is None or isinstance(local_tensor(parameter), FakeTensor):
            return None
        if parameter not in made:
            made[parameter] = _fake(mode, parameter)
        return made[parameter]

    handle = register_module_parameter_registration_hook(replace)
    # Module.to swaps parameters, which torch refuses where something has a weak reference to them.
    converter: Any = mode.fake_tensor_converter
    converter.set_tensor_memo = lambda real, fake: None
    try:
        yield
    finally:
        del converter.set_tensor_memo
        handle.remove()


def make_fake(task: nn.Module, mode: FakeTensorMode) -> None:
    """Replace what is real of the parameters and buffers of ``task``, in place."""
    made: dict[int, Any] = {}
    for module in task.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or isinstance(local_tensor(tensor), FakeTensor):
                    continue
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, _fake(mode, tensor)
                held[name] = made[id(tensor)][1]


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Any:
    # mode.from_tensor keeps weak references, with which torch cannot move a parameter.
    with mode:
        fake = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def resized(mode: FakeTensorMode, batch: Any, size: int, wanted: int) -> Any:
    """Return a fake of ``batch`` with ``wanted`` samples.

    Args:
        mode: makes the fake tensors.
        batch: a real batch. Tensors whose first dimension is ``size`` have a row for each sample.
        size: its samples.
        wanted: the samples of the result.
    """

    def fake(tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        if shape and shape[0] == size:
            shape[0] = wanted
        with mode:
            return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)

    def keep(value: Any) -> Any:
        return value

    objects: Callable[[Any], Any] = keep
    return map_batch(batch, fake, objects)
