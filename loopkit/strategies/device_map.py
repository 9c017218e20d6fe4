"""The layers of one model on several devices of one process, by the user's map or by their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loopkit.devices import count_devices, visible_devices
from loopkit.distributed.communicator import Communicator
from loopkit.dtypes import stored_dtype
from loopkit.errors import OptionError
from loopkit.rng import torch_seeder
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.device_placement import balanced, by_hand, connect
from loopkit.strategies.module_strategy import ModuleStrategy
from loopkit.strategies.precision import Both, forward_context

DeviceMap = str | Mapping[str, str | int]
_WITHOUT_VALUES = ("meta", "disk")


def parse_device_map(device_map: object) -> dict[str, torch.device] | None:
    """Return the device of each prefix of module names; None for "auto".

    Raises:
        OptionError: ``device_map`` is neither "auto" nor a mapping to devices, or this machine
            cannot compute on one of them.
    """
    if device_map == "auto":
        return None
    if not isinstance(device_map, Mapping) or not device_map:
        raise OptionError(
            f"device_map={device_map!r}: give 'auto', or the device of each part by the start of "
            "its name, as {'encoder': 'cpu', 'head': 'cuda:0'}"
        )
    return {str(prefix): _parse_device(str(prefix), given) for prefix, given in device_map.items()}


def _parse_device(prefix: str, given: object) -> torch.device:
    shown = f"device_map gives {prefix!r} {given!r}"
    if given in _WITHOUT_VALUES or (isinstance(given, torch.device) and given.type == "meta"):
        raise OptionError(
            f"{shown}, where parameters have no values: they can be neither trained nor "
            "computed with. Give a device of this machine, or make the model smaller"
        )
    try:
        device = torch.device(f"cuda:{given}" if type(given) is int else given)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            f"{shown}, which is no device: give 'cpu', 'cuda:0', 'mps' or a GPU's number"
        ) from error
    counts = {kind: count_devices(kind) for kind in ("cpu", "cuda", "mps", device.type)}
    if (device.index or 0) >= counts[device.type]:
        have = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        raise OptionError(f"{shown}, which is not on this machine: it has {have}")
    if device.type in ("cpu", "mps"):
        return torch.device(device.type)
    return torch.device(device.type, device.index or 0)


class DeviceMapStrategy(ModuleStrategy):
    """The layers of one task on several devices of one process, which compute one after another.

    Batches go to the first device. A layer gets its inputs on its own device. The task's methods
    get the outputs of its layers on the first device, so that a step needs no ``.to``.

    Args:
        device_map: "auto" divides the layers, in order, into parts of about the same bytes. A
            mapping gives the device of each module by the start of its name: the longest start that
            fits decides, and ``""`` is everything else.
        devices: the devices that "auto" divides the layers among; None takes every GPU.

    Raises:
        OptionError: this machine lacks a device, or cannot compute on it.
    """

    def __init__(
        self, device_map: DeviceMap = "auto", devices: Sequence[torch.device] | None = None
    ) -> None:
        self._by_prefix = parse_device_map(device_map)
        given = self._by_prefix.values() if self._by_prefix else devices or visible_devices()
        self.devices = list(dict.fromkeys(given))
        self._handles: list[RemovableHandle] = []

    def _join_ranks(self) -> tuple[torch.device, Communicator]:
        return self.devices[0], Communicator()

    def setup_environment(self, settings: ComputeSettings | None = None) -> None:
        """Take the devices, with the context of the precision for each kind; see ``Strategy``."""
        super().setup_environment(settings)
        seeders = [torch_seeder(device) for device in self.devices]
        if len(seeders) > 1:
            self.set_seed = lambda value: [seeder(value) for seeder in seeders]
        if self.settings.precision.autocast is not None and self.forward_context is not None:
            for kind in {device.type for device in self.devices} - {self.device.type}:
                other = forward_context(self.settings.precision, torch.device(kind))
                assert other is not None
                self.forward_context = Both(self.forward_context, other)

    def _move(self, task: nn.Module) -> None:
        self._remove_hooks()
        if self._by_prefix is None:
            device_of = balanced(task, self.devices)
        else:
            device_of = by_hand(task, self._by_prefix, self.device)
        for name, tensor in (*task.named_parameters(), *task.named_buffers()):
            if tensor.is_meta:
                raise OptionError(
                    f"device_map: {name} is on meta and has no values to move: build it on a device"
                )
        dtype = self.settings.precision.storage
        for name, module in task.named_modules():
            if name in device_of:
                module._apply(_converter(device_of[name], dtype), recurse=False)
        if len(set(device_of.values())) > 1:
            self._handles = connect(task, device_of, self.device)

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``, which may be on any of the devices; see ``Strategy``."""
        super().backward(loss.to(self.device), None if value is None else value.to(self.device))

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Make the gradients ready, device by device; see ``Strategy``."""
        names = names or tuple(self._parameters)
        grads: dict[torch.device, list[Tensor]] = {}
        for name in names:
            for parameter in self._parameters[name]:
                if parameter.grad is not None:
                    grads.setdefault(parameter.grad.device, []).append(parameter.grad)
        return self._finalize(
            self,
            list(grads.values()),
            names,
            divisor,
            want_norm=want_norm,
            reduce_norm=partial(self._norm, grads.values()) if len(self.devices) > 1 else None,
        )

    def _norm(self, grads: Iterable[list[Tensor]]) -> Tensor:
        """Return the norm of all gradients, on the device of the non-finite flag."""
        norms = [norm.to(self.device) for held in grads for norm in torch._foreach_norm(held)]
        total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total

    def teardown(self, failed: bool = False) -> None:
        """Remove the hooks from the task's modules; its layers stay where they are."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _converter(device: torch.device, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Return a function that moves a tensor to ``device``, as ``stored_dtype`` says."""
    return lambda tensor: tensor.to(device, stored_dtype(tensor.dtype, dtype))
