"""Device placement: the device of each module of a task, and the hooks that move tensors between."""

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
    """Return the device of every module that holds tensors, by its name.

    Args:
        devices: the device of each prefix of module names; the longest that fits decides. The start
            of a name may be left out where one module alone fits, as in a map of the model that a
            task holds.
        first: the device of the task's own tensors if no prefix fits.

    Raises:
        OptionError: no module has a prefix, a module has no device, or a shared parameter has two.
    """
    modules = dict(task.named_modules())
    devices = {_whole_name(task, prefix, modules): device for prefix, device in devices.items()}
    device_of: dict[str, torch.device] = {}
    for name, module in modules.items():
        if _own_tensors(module):
            fits = [p for p in devices if p in ("", name) or name.startswith(f"{p}.")]
            if not fits and name:
                raise OptionError(
                    f"device_map says nothing of {name}, which holds parameters: name it, or give "
                    "'' a device for everything else"
                )
            device_of[name] = devices[max(fits, key=len)] if fits else first
    for owner, name in _sharing_modules(modules):
        if device_of[name] != device_of[owner]:
            raise OptionError(
                f"device_map puts {owner} on {device_of[owner]} and {name} on {device_of[name]}, "
                "and they share a parameter: give both the same device"
            )
    return device_of


def _whole_name(task: nn.Module, prefix: str, modules: Mapping[str, nn.Module]) -> str:
    """Return the name of the module that a prefix means.

    Raises:
        OptionError: no module has that name, or several end with it.
    """
    if prefix in modules:
        return prefix
    found = [name for name in modules if name.endswith(f".{prefix}")]
    if len(found) == 1:
        return found[0]
    several = f"several: {', '.join(found[:3])}. Give the whole name" if found else ""
    raise OptionError(
        f"device_map names {prefix!r}, and {type(task).__name__} has "
        + (
            several
            or f"no module of that name.{nearest(prefix, modules)} It has "
            f"{', '.join(list(modules)[1:13])}"
        )
    )


def balanced(task: nn.Module, devices: Sequence[torch.device]) -> dict[str, torch.device]:
    """Return the device of every module that holds tensors, with about the same bytes on each.

    Consecutive modules go to one device. A repeated block stays whole, because it adds its input to
    its output.
    """
    blocks = {id(block) for block in repeated_blocks(task)}
    units = list(_indivisible_units(task, "", blocks))
    modules = dict(task.named_modules())
    sizes: list[int] = []
    seen: set[int] = set()
    for names in units:
        tensors = {id(t): t for name in names for t in _own_tensors(modules[name])}
        sizes.append(sum(t.nbytes for key, t in tensors.items() if key not in seen))
        seen |= set(tensors)
    chosen = divide(sizes, len(devices))
    device_of = {name: devices[part] for names, part in zip(units, chosen) for name in names}
    unit_of = {name: names for names in units for name in names}
    for owner, name in _sharing_modules(modules):
        device_of |= dict.fromkeys(unit_of[name], device_of[owner])
    return device_of


def divide(sizes: Sequence[int], parts: int) -> list[int]:
    """Return which of ``parts`` consecutive parts of about the same sum each size belongs to.

    The middle of a size decides.
    """
    total = sum(sizes) or 1
    before = 0
    chosen = []
    for size in sizes:
        chosen.append(min(parts - 1, int((2 * before + size) * parts / (2 * total))))
        before += size
    return chosen


def connect(
    task: nn.Module, device_of: Mapping[str, torch.device], first: torch.device
) -> list[RemovableHandle]:
    """Hook modules so that each gets its inputs on its device, and the task all outputs on ``first``.

    Args:
        device_of: the device of each module that holds tensors, by its name.
    """
    handles = []
    for name, module in task.named_modules():
        devices = {
            device
            for inner, device in device_of.items()
            if inner == name or not name or inner.startswith(f"{name}.")
        }
        if len(devices) == 1 and name:
            to_device = _ToDevice(next(iter(devices)))
            handles.append(module.register_forward_pre_hook(to_device.inputs, with_kwargs=True))
    handles += [
        module.register_forward_hook(_ToDevice(first).outputs) for module in _called_by_task(task)
    ]
    return handles


class _ToDevice:
    """Hooks on a module that move the tensors of a call to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def inputs(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Return the arguments of a call, on the device."""
        moved = {name: self._move(value) for name, value in kwargs.items()}
        return tuple(self._move(value) for value in args), moved

    def outputs(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return what a call returned, on the device."""
        return self._move(output)

    def _move(self, value: Any) -> Any:
        # The outputs of transformers are dicts whose items are attributes too.
        if isinstance(value, dict) and type(value) is not dict:
            moved = copy.copy(value)
            for key, part in value.items():
                moved[key] = self._move(part)
            return moved
        non_blocking = self.device.type == "cuda"
        return map_tensors(lambda t: t.to(self.device, non_blocking=non_blocking), value)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module holds itself."""
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def _sharing_modules(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yield pairs of modules that hold the same tensor: the first module that has it, and another."""
    owner: dict[int, str] = {}
    for name, module in modules.items():
        for tensor in _own_tensors(module):
            if owner.setdefault(id(tensor), name) != name:
                yield owner[id(tensor)], name


def _indivisible_units(module: nn.Module, name: str, blocks: set[int]) -> Iterator[list[str]]:
    """Yield the parts of ``module`` that stay on one device, as names of modules with tensors.

    Args:
        name: the name of ``module`` in the task.
        blocks: the repeated blocks by their ``id``.
    """
    if name and (id(module) in blocks or not _is_divisible(module, blocks)):
        unit = [
            f"{name}.{inner}" if inner else name
            for inner, m in module.named_modules()
            if _own_tensors(m)
        ]
        yield from [unit] if unit else []
        return
    if _own_tensors(module):
        yield [name]
    for child_name, child in module.named_children():
        yield from _indivisible_units(child, f"{name}.{child_name}" if name else child_name, blocks)


def _is_divisible(module: nn.Module, blocks: set[int]) -> bool:
    """Return whether a module is a list of modules, or has blocks inside."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return True
    return any(id(inner) in blocks for inner in module.modules() if inner is not module)


def _called_by_task(task: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that a task's methods call: its children, and the members of its lists."""
    for child in task.children():
        is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))
        yield from _called_by_task(child) if is_list else (child,)
