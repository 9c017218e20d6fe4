"""The state of DeepSpeed's ZeRO: whole tensors by parameter out of its flat parts, and back into
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.errors import CheckpointError, OptionError


def is_partitioned(parameter: Any) -> bool:
    """Whether a parameter is one of stage 3's, of which each rank holds a part."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> torch.Size:
    """The whole shape."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape


class ZeroState:
    """Reads and writes what a ZeRO optimizer holds. All methods are collective.

    Stages 1 and 2 keep single-precision copies of the parameters and their state in one flat tensor
    per group, of which each rank has a part; stage 3 keeps them by group too, of each rank's part
    of every parameter.

    Args:
        zero: the engine's optimizer, around the one that the task gave.
        names: the parameters' names by their ``id``.
        rank, world_size: of those that the parts are spread over.
    """

    def __init__(self, zero: Any, names: Mapping[int, str], rank: int, world_size: int) -> None:
        self.zero, self.names = zero, names
        self.rank, self.world_size = rank, world_size
        self.base = zero.optimizer
        self.parameters = {id(p) for _, held in self._flats() for p in held}

    def _flats(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """Each flat tensor of this rank, which the optimizer steps, and the parameters that it has
        parts of.
        """
        if hasattr(self.zero, "fp32_partitioned_groups_flat"):
            yield from zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups)
        else:
            yield from zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups)

    def weight(self, parameter: Tensor) -> Tensor:
        """The whole parameter in single precision, as the optimizer has it."""
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor = safe_get_full_fp32_param(parameter)
        return found

    def set_weight(self, parameter: Tensor, value: Tensor) -> None:
        """Give the optimizer's copy of a parameter a whole value."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, self._part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value.to(torch.float32))

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All state by "<parameter>/<key>": tensors, whole on the first rank and without memory on
        the others; values.

        Raises:
            OptionError: the optimizer keeps something that is of no single element.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {}
        for flat, parameters in self._flats():
            self._link(parameters, flat)
            for key, value in self.base.state.get(flat, {}).items():
                if isinstance(value, Tensor) and value.ndim and value.shape != flat.shape:
                    raise OptionError(
                        f"{type(self.base).__name__} keeps {key!r}, which is no number for each "
                        f"element: DeepSpeed's "
                        "flat parts cannot be saved by parameter. Take strategy='fsdp'"
                    )
                for parameter in parameters:
                    full = f"{self.names[id(parameter)]}/{key}"
                    if not isinstance(value, Tensor):
                        values[full] = value
                    elif value.ndim:
                        tensors[full] = self.keep(safe_get_full_optimizer_state(parameter, key))
                    else:
                        tensors[full] = value.clone()
        return tensors, values

    def keep(self, tensor: Tensor) -> Tensor:
        """A gathered tensor as it is saved: in the first rank's memory, since it alone writes."""
        return tensor.cpu() if self.rank == 0 else tensor.to("meta")

    def compare(self, saved: Mapping[str, Mapping[str, Any]], path: Any) -> None:
        """Refuse a state whose counts differ within what DeepSpeed steps as one.

        Raises:
            CheckpointError: with the parameters.
        """
        for _, parameters in self._flats():
            counts: dict[str, Any] = {}
            counted = self._counted(parameters, saved)
            for parameter in parameters:
                for key, value in saved.get(self.names[id(parameter)], {}).items():
                    if key in counted:
                        name, first = counts.setdefault(
                            key, (self.names[id(parameter)], float(value))
                        )
                        if first != float(value):
                            raise CheckpointError(
                                f"{path}: {key!r} is {first:g} for {name} and {float(value):g} for "
                                f"{self.names[id(parameter)]}, which DeepSpeed steps together: "
                                f"give them groups of "
                                "their own, or go on under another strategy"
                            )

    def write(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Put back state by parameter and key, all of it; what is not there begins anew."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for flat, parameters in self._flats():
            state: dict[str, Any] = {}
            counted = self._counted(parameters, saved)
            whole: list[tuple[nn.Parameter, str, Tensor]] = []
            for parameter in parameters:
                for key, value in saved.get(self.names[id(parameter)], {}).items():
                    if key in counted:
                        state[key] = value.clone() if isinstance(value, Tensor) else value
                    else:
                        state.setdefault(key, torch.zeros_like(flat))
                        whole.append((parameter, key, value))
            self.base.state.pop(flat, None)
            if state:
                self.base.state[flat] = state
            self._link(parameters, flat)
            for parameter, key, value in whole:
                if is_partitioned(parameter):
                    safe_set_local_optimizer_state(parameter, self._part(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value.to(torch.float32), key)

    def _counted(
        self, parameters: list[nn.Parameter], saved: Mapping[str, Mapping[str, Any]]
    ) -> set[str]:
        """What of the state is one value for all elements, such as the count of steps."""
        return {
            key
            for parameter in parameters
            for key, value in saved.get(self.names[id(parameter)], {}).items()
            if not isinstance(value, Tensor)
            or (not value.ndim and (key == "step" or len(full_shape(parameter))))
        }

    def _link(self, parameters: list[nn.Parameter], flat: Tensor) -> None:
        """Have stages 1 and 2 find the state of a flat tensor; by themselves they look for the
        first group's alone.
        """
        for parameter in parameters:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                mapping.set_optim_state_fragment(flat, self.base.state.get(flat, {}))

    def _part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor; the last ranks' may end in padding, or be nothing
        else.
        """
        size = parameter.ds_tensor.numel()
        flat = (
            value.detach().reshape(-1)[size * self.rank : size * (self.rank + 1)].to(torch.float32)
        )
        return torch.nn.functional.pad(flat, (0, size - flat.numel()))


@contextmanager
def skip_scalar_broadcast(task: nn.Module) -> Iterator[None]:
    """Inside, DeepSpeed does not send scalar parameters, which it can only send as vectors; all
    ranks have them.
    """
    scalars: list[Any] = [p for p in task.parameters() if not p.ndim]
    for parameter in scalars:
        parameter.ds_optim_param = True  # what it knows those by that differ from rank to rank
    yield
    for parameter in scalars:
        del parameter.ds_optim_param


class AttributeSnapshot:
    """What modules and parameters carried before DeepSpeed, so that what it leaves on them can be
    taken off.
    """

    def __init__(self, root: nn.Module) -> None:
        self._modules = {module: set(vars(module)) for module in root.modules()}
        self._parameters = {parameter: _own(parameter) for parameter in root.parameters()}

    def remove(self, root: nn.Module) -> None:
        """Leave modules and parameters as they came; hooks are the engine's to remove."""
        for module in root.modules():
            module._parameters = dict(module._parameters.items())
            for name in vars(module).keys() - self._modules.get(module, vars(module).keys()):
                delattr(module, name)
        for parameter in root.parameters():
            for name in vars(parameter).keys() - self._parameters.get(
                parameter, vars(parameter).keys()
            ):
                delattr(parameter, name)


def _own(parameter: nn.Parameter) -> set[str]:
    """The attributes that are not DeepSpeed's, which made a parameter in parts before there was an
    engine.
    """
    if not is_partitioned(parameter):
        return set(vars(parameter))
    theirs = {"is_external_param", "nvme_swapper"}
    own = {
        name
        for name, value in vars(parameter).items()
        if not name.startswith("ds_") and not callable(value)
    }
    return own - theirs
