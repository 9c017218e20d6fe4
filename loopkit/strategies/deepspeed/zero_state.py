"""The state of DeepSpeed's ZeRO optimizers: its flat parts as whole tensors by parameter, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.errors import CheckpointError, OptionError

# Of one parameter: its state by key.
ParameterState = Mapping[str, Any]


def is_partitioned(parameter: Any) -> bool:
    """Return whether stage 3 has partitioned a parameter, so that each rank holds a part."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: Any) -> torch.Size:
    """Return the shape of the whole parameter."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape


class ZeroState:
    """Reads and writes the state of a ZeRO optimizer. All methods are collective.

    Stages 1 and 2 keep single-precision copies of the parameters, and their state, in one flat
    tensor per group, of which each rank has a part. Stage 3 has flat tensors per group too, of this
    rank's part of every parameter.

    Args:
        zero: the engine's optimizer, around the one that the task gave.
        names: the parameters' names by their ``id``.
        rank, world_size: those of the ranks that share the parts.
    """

    def __init__(self, zero: Any, names: Mapping[int, str], rank: int, world_size: int) -> None:
        self.zero = zero
        self.base = zero.optimizer
        self.names = names
        self.rank = rank
        self.world_size = world_size
        self.parameters = {id(p) for _, parameters in self._flats() for p in parameters}

    def _flats(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """Yield each flat tensor that this rank steps, with the parameters that it has parts of."""
        if hasattr(self.zero, "fp32_partitioned_groups_flat"):
            yield from zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups)
        else:
            yield from zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups)

    def weight(self, parameter: Tensor) -> Tensor:
        """Return the optimizer's single-precision copy of a parameter, whole."""
        from deepspeed.utils import safe_get_full_fp32_param

        found: Tensor = safe_get_full_fp32_param(parameter)
        return found

    def set_weight(self, parameter: Tensor, value: Tensor) -> None:
        """Set the optimizer's copy of a parameter to a whole value."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if is_partitioned(parameter):
            safe_set_local_fp32_param(parameter, self._local_part(parameter, value))
        else:
            safe_set_full_fp32_param(parameter, value.to(torch.float32))

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state by "<parameter>/<key>": first tensors, then plain values.

        Tensors are whole on rank 0 and on the meta device of the other ranks.

        Raises:
            OptionError: the optimizer keeps a tensor that has no number for each element.
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
                        "element: DeepSpeed's flat parts cannot be saved by parameter. Take "
                        "strategy='fsdp'"
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
        """Return a gathered tensor in the memory of rank 0, the only rank that writes it."""
        return tensor.cpu() if self.rank == 0 else tensor.to("meta")

    def compare(self, saved: Mapping[str, ParameterState], path: Any) -> None:
        """Refuse a state whose counts differ among parameters that DeepSpeed steps as one.

        Args:
            saved: the state of each parameter by its name.
            path: the checkpoint, for messages.

        Raises:
            CheckpointError: two parameters of one flat tensor have different counts.
        """
        for _, parameters in self._flats():
            counts: dict[str, tuple[str, float]] = {}
            shared = self._shared_keys(parameters, saved)
            for parameter in parameters:
                name = self.names[id(parameter)]
                for key, value in saved.get(name, {}).items():
                    if key not in shared:
                        continue
                    first_name, first = counts.setdefault(key, (name, float(value)))
                    if first != float(value):
                        raise CheckpointError(
                            f"{path}: {key!r} is {first:g} for {first_name} and {float(value):g} "
                            f"for {name}, which DeepSpeed steps together: give each a parameter "
                            "group, or resume under another strategy"
                        )

    def write(self, saved: Mapping[str, ParameterState]) -> None:
        """Load the state of all parameters by name; one without a saved state starts again."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        for flat, parameters in self._flats():
            state: dict[str, Any] = {}
            whole: list[tuple[nn.Parameter, str, Tensor]] = []
            shared = self._shared_keys(parameters, saved)
            for parameter in parameters:
                for key, value in saved.get(self.names[id(parameter)], {}).items():
                    if key in shared:
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
                    part = self._local_part(parameter, value)
                    safe_set_local_optimizer_state(parameter, part, key)
                else:
                    safe_set_full_optimizer_state(parameter, value.to(torch.float32), key)

    def _shared_keys(
        self, parameters: list[nn.Parameter], saved: Mapping[str, ParameterState]
    ) -> set[str]:
        """Return the keys with one value for all elements, such as the count of steps."""
        return {
            key
            for parameter in parameters
            for key, value in saved.get(self.names[id(parameter)], {}).items()
            if not isinstance(value, Tensor)
            or (not value.ndim and (key == "step" or len(full_shape(parameter))))
        }

    def _link(self, parameters: list[nn.Parameter], flat: Tensor) -> None:
        """Have stages 1 and 2 find the state of ``flat``; else they look in the first group alone."""
        for parameter in parameters:
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                mapping.set_optim_state_fragment(flat, self.base.state.get(flat, {}))

    def _local_part(self, parameter: Any, value: Tensor) -> Tensor:
        """Return this rank's part of a whole tensor, padded with zeros to the size of a part."""
        size = parameter.ds_tensor.numel()
        start = size * self.rank
        part = value.detach().reshape(-1)[start : start + size].to(torch.float32)
        return torch.nn.functional.pad(part, (0, size - part.numel()))


@contextmanager
def skip_scalar_broadcast(task: nn.Module) -> Iterator[None]:
    """Inside, DeepSpeed does not broadcast scalar parameters, which all ranks have already.

    DeepSpeed can broadcast vectors only.
    """
    scalars: list[Any] = [p for p in task.parameters() if not p.ndim]
    for parameter in scalars:
        # DeepSpeed's mark for parameters that differ from rank to rank.
        parameter.ds_optim_param = True
    yield
    for parameter in scalars:
        del parameter.ds_optim_param


class AttributeSnapshot:
    """The attributes of modules and parameters before DeepSpeed adds its own, to remove those."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = {module: set(vars(module)) for module in root.modules()}
        self._parameters = {
            parameter: _own_attributes(parameter) for parameter in root.parameters()
        }

    def remove(self, root: nn.Module) -> None:
        """Remove the attributes that were added; the engine removes its hooks itself."""
        for module in root.modules():
            # DeepSpeed replaces the dict by one of a class of its own.
            module._parameters = dict(module._parameters.items())
            _remove_added(module, self._modules)
        for parameter in root.parameters():
            _remove_added(parameter, self._parameters)


def _remove_added(owner: Any, before: Mapping[Any, set[str]]) -> None:
    present = set(vars(owner))
    for name in present - before.get(owner, present):
        delattr(owner, name)


def _own_attributes(parameter: nn.Parameter) -> set[str]:
    """Return the attributes that are not DeepSpeed's.

    If configure_model has made the parameter partitioned, DeepSpeed's are there before the engine.
    """
    if not is_partitioned(parameter):
        return set(vars(parameter))
    own = {
        name
        for name, value in vars(parameter).items()
        if not name.startswith("ds_") and not callable(value)
    }
    return own - {"is_external_param", "nvme_swapper"}
