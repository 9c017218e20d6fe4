"""Placement: which module of a task is on which device, and what brings tensors over the
boundaries.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loopkit.errors import OptionError, nearest
from loopkit.nested import map_tensors
from loopkit.strategies.activation_checkpointing import repeated_blocks


def by_hand(
    task: nn.Module, devices: Mapping[str, torch.device], first: torch.device
) -> dict[str, torch.device]:
    """The device of every module that holds tensors of its own, by the module's name.

    Raises:
        OptionError: a prefix that no module has, a module without a device, or a shared parameter
            with two.
    """
    modules = dict(task.named_modules())
    for prefix in devices:
        if prefix not in modules:
            raise OptionError(
                f"device_map names {prefix!r}, and {type(task).__name__} has no module of that "
                f"name."
                f"{nearest(prefix, modules)} It has {', '.join(list(modules)[1:13])}"
            )
    places: dict[str, torch.device] = {}
    for name, module in modules.items():
        if _own(module):
            fits = [p for p in devices if p in ("", name) or name.startswith(f"{p}.")]
            if not fits and name:
                raise OptionError(
                    f"device_map says nothing of {name}, which holds parameters: name it, or give "
                    f"'' a "
                    "device for everything else"
                )
            places[name] = devices[max(fits, key=len)] if fits else first
    for first_name, name in _shared(modules):
        if places[name] != places[first_name]:
            raise OptionError(
                f"device_map puts {first_name} on {places[first_name]} and {name} on "
                f"{places[name]}, and "
                "they share a parameter: give both the same device"
            )
    return places


def balanced(task: nn.Module, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """The device of every module that holds tensors, so that each device has about the same bytes,
    in order.

    A repeated block stays whole: what it adds up inside must be in one place.
    """
    blocks = {id(block) for block in repeated_blocks(task)}
    units = list(_units(task, "", blocks))
    modules = dict(task.named_modules())
    sizes, seen = [], set[int]()
    for members in units:
        tensors = {id(t): t for name in members for t in _own(modules[name]) if id(t) not in seen}
        seen |= set(tensors)
        sizes.append(sum(t.numel() * t.element_size() for t in tensors.values()))
    chosen = divide(sizes, len(devices))
    places = {name: devices[part] for members, part in zip(units, chosen) for name in members}
    unit_of = {name: members for members in units for name in members}
    for first_name, name in _shared(modules):
        places |= dict.fromkeys(unit_of[name], places[first_name])
    return places


def divide(sizes: Sequence[int], parts: int) -> list[int]:
    """Which of ``parts`` consecutive stretches of about the same sum each size falls to: by where
    its middle lies.
    """
    total, before, chosen = sum(sizes) or 1, 0, []
    for size in sizes:
        chosen.append(min(parts - 1, int((2 * before + size) * parts / (2 * total))))
        before += size
    return chosen


def connect(
    task: nn.Module, places: Mapping[str, torch.device], first: torch.device
) -> list[RemovableHandle]:
    """Have every module get its inputs on its own device, and the task its layers' outputs on the
    first.
    """
    handles = []
    for name, module in task.named_modules():
        inside = {
            device
            for held, device in places.items()
            if held == name or not name or held.startswith(f"{name}.")
        }
        if len(inside) == 1 and name:
            bring = _Bring(next(iter(inside)))
            handles.append(module.register_forward_pre_hook(bring.inputs, with_kwargs=True))
    handles += [module.register_forward_hook(_Bring(first).outputs) for module in _called(task)]
    return handles


class _Bring:
    """Brings the tensors of a call to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """What a module is called with, on the device."""
        return tuple(self._moved(part) for part in args), {
            name: self._moved(part) for name, part in kwargs.items()
        }

    def outputs(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """What a module returns, on the device."""
        return self._moved(output)

    def _moved(self, value: Any) -> Any:
        if (
            isinstance(value, dict) and type(value) is not dict
        ):  # transformers' outputs have their items as attributes
            fresh = copy.copy(value)
            for key, part in value.items():
                fresh[key] = self._moved(part)
            return fresh
        return map_tensors(
            lambda tensor: tensor.to(self.device, non_blocking=self.device.type == "cuda"), value
        )


def _own(module: nn.Module) -> list[Tensor]:
    """The tensors that a module holds itself."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _shared(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Pairs of modules that hold the same tensor, the first that has it in front."""
    owner: dict[int, str] = {}
    for name, module in modules.items():
        for tensor in _own(module):
            if owner.setdefault(id(tensor), name) != name:
                yield owner[id(tensor)], name


def _units(module: nn.Module, name: str, blocks: set[int]) -> Iterator[list[str]]:
    """What stays together: the names of the modules with tensors in each part that is not divided
    further.
    """
    if name and (id(module) in blocks or not _divisible(module, blocks)):
        inner = [
            f"{name}.{below}" if below else name for below, m in module.named_modules() if _own(m)
        ]
        yield from [inner] if inner else []
        return
    if _own(module):
        yield [name]
    for below, child in module.named_children():
        yield from _units(child, f"{name}.{below}" if name else below, blocks)


def _divisible(module: nn.Module, blocks: set[int]) -> bool:
    """Whether a module's children may stand on several devices: lists of modules, and what blocks
    are within.
    """
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    return any(id(below) in blocks for below in module.modules() if below is not module)


def _called(task: nn.Module) -> Iterator[nn.Module]:
    """The modules that a task's own methods call: its children, and the members of lists among
    them.
    """
    for child in task.children():
        yield from _called(child) if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else (child,)
