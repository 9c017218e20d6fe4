"""Spread: the layers of one model over several devices of one process, by hand or balanced by their
bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loopkit.devices import count_devices, visible_devices
from loopkit.errors import OptionError
from loopkit.rng import torch_seeder
from loopkit.strategies.base import ComputeSettings
from loopkit.strategies.device_placement import balanced, by_hand, connect
from loopkit.strategies.precision import Both, forward_context
from loopkit.strategies.single import SingleDevice

DeviceMap = str | Mapping[str, str | int]
NOWHERE = ("meta", "disk")


def parse_device_map(device_map: object) -> dict[str, torch.device] | None:
    """The devices by prefix; None for "auto".

    Raises:
        OptionError: it is neither "auto" nor a mapping to devices, or a device on which nothing can
            be computed.
    """
    if device_map == "auto":
        return None
    if not isinstance(device_map, Mapping) or not device_map:
        raise OptionError(
            f"device_map={device_map!r}: give 'auto', or the device of each part by the start of "
            f"its "
            "name, as {'encoder': 'cpu', 'head': 'cuda:0'}"
        )
    return {str(prefix): _device(str(prefix), device) for prefix, device in device_map.items()}


def _device(prefix: str, device: object) -> torch.device:
    shown = f"device_map gives {prefix!r} {device!r}"
    if device in NOWHERE or (isinstance(device, torch.device) and device.type == "meta"):
        raise OptionError(
            f"{shown}, where parameters have no values: they can be neither trained nor "
            "computed with. Give a device of this machine, or make the model smaller"
        )
    try:
        found = torch.device(f"cuda:{device}" if type(device) is int else device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise OptionError(
            f"{shown}, which is no device: give 'cpu', 'cuda:0', 'mps' or a GPU's number"
        ) from error
    counts = {kind: count_devices(kind) for kind in ("cpu", "cuda", "mps", found.type)}
    if (found.index or 0) >= counts[found.type]:
        have = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        raise OptionError(f"{shown}, which is not on this machine: it has {have}")
    return (
        torch.device(found.type)
        if found.type in ("cpu", "mps")
        else torch.device(found.type, found.index or 0)
    )


class DeviceMapStrategy(SingleDevice):
    """The layers of one task over several devices, in one process: one computes after the other.

    Batches go to the first device. A layer's inputs are brought to the layer's device, and what the
    task's own methods get back from its layers is on the first device again, so that a step needs
    no ``.to``.

    Args:
        device_map: "auto" divides the layers, in order, into parts of about the same bytes; or the
            device of each module by the start of its name: the longest that fits counts, and ``""``
            is everything else.
        devices: what "auto" divides among; None takes every GPU.

    Raises:
        OptionError: a device that this machine has not, or on which nothing can be computed.
    """

    def __init__(
        self, device_map: DeviceMap = "auto", devices: Sequence[torch.device] | None = None
    ) -> None:
        self._by_hand = parse_device_map(device_map)
        self.devices = list(
            dict.fromkeys(self._by_hand.values() if self._by_hand else devices or visible_devices())
        )
        super().__init__(str(self.devices[0]))
        seeders = [torch_seeder(device) for device in self.devices]
        if len(seeders) > 1:
            self.set_seed = lambda value: [seeder(value) for seeder in seeders]
        self._handles: list[RemovableHandle] = []

    def setup_environment(self, numerics: ComputeSettings | None = None) -> None:
        """Fix the numerics, for every kind of device."""
        super().setup_environment(numerics)
        if self.settings.precision.autocast is not None and self.forward_context is not None:
            for kind in {device.type for device in self.devices} - {self.device.type}:
                other = forward_context(self.settings.precision, torch.device(kind))
                assert other is not None
                self.forward_context = Both(self.forward_context, other)

    def _move(self, task: nn.Module) -> None:
        self._disconnect()
        places = (
            balanced(task, self.devices)
            if self._by_hand is None
            else by_hand(task, self._by_hand, self.device)
        )
        for name, tensor in (*task.named_parameters(), *task.named_buffers()):
            if tensor.is_meta:
                raise OptionError(
                    f"device_map: {name} is on meta and has no values to move: build it on a device"
                )
        dtype = self.settings.precision.storage
        for name, module in task.named_modules():
            if name in places:
                module._apply(_mover(places[name], dtype), recurse=False)
        if len(set(places.values())) > 1:
            self._handles = connect(task, places, self.device)

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of ``loss``, wherever it was computed."""
        super().backward(loss.to(self.device), None if value is None else value.to(self.device))

    def finalize_gradients(
        self,
        names: Sequence[str] | None = None,
        divisor: Tensor | float | None = None,
        *,
        want_norm: bool = False,
    ) -> Tensor | None:
        """Make the gradients ready, device by device; see ``Strategy.finalize_gradients``."""
        names = names or tuple(self._parameters)
        grads: dict[torch.device, list[Tensor]] = {}
        for name in names:
            for parameter in self._parameters[name]:
                if parameter.grad is not None:
                    grads.setdefault(parameter.grad.device, []).append(parameter.grad)
        return self._finalize(
            list(grads.values()),
            names,
            divisor,
            want_norm=want_norm,
            reduce_norm=partial(self._norm, grads.values()) if len(self.devices) > 1 else None,
        )

    def _norm(self, grads: Iterable[list[Tensor]]) -> Tensor:
        """Return the norm of all gradients, on the first device, where the guard's flag is."""
        norms = [norm.to(self.device) for held in grads for norm in torch._foreach_norm(held)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def teardown(self, failed: bool = False) -> None:
        """Take the hooks off the task; its layers stay where they are."""
        self._disconnect()
        super().teardown(failed)

    def _disconnect(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _mover(device: torch.device, dtype: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(
        device, dtype if tensor.is_floating_point() or tensor.is_complex() else None
    )
