"""What a task changes about itself during a run: a checkpoint holds it, or a message names it.

Buffers that a step registers are saved, and a resume registers them again. Parameters cannot come
during a run: no optimizer would hold them. Numbers, tensors and generators that are plain attributes
are in no checkpoint, so a resume names those that had changed.
"""

from __future__ import annotations

import hashlib
import random
import weakref
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from loopkit.errors import TaskError

# Modules of these packages keep the state that matters in parameters and buffers.
_LIBRARIES = {"torch", "torchmetrics", "torchvision", "transformers", "peft", "timm", "diffusers"}
_LARGEST = 1 << 20  # bytes of an array that is compared by its values
_LONGEST = 1000  # entries of a list that is compared
_DEEPEST = 3  # lists inside of each other; a list may hold itself
_REMEDY = "Keep it in a buffer (register_buffer) or give its module get_extra_state"


@dataclass
class TaskAtStart:
    """A task as it was when its optimizers were made.

    Attributes:
        requires_grad: of each parameter, by name.
        buffers: the names of the buffers.
        attributes: what identifies the value of each plain attribute, taken before the first step.
        lost: attributes that had changed before the checkpoint that the run was resumed from.
    """

    requires_grad: dict[str, bool] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    attributes: dict[str, Any] = field(default_factory=dict)
    lost: Sequence[str] = ()

    @classmethod
    def of(cls, task: nn.Module) -> TaskAtStart:
        """Return what ``task`` is now; its plain attributes follow by ``watch_attributes``."""
        needed = {name: p.requires_grad for name, p in task.named_parameters()}
        return cls(needed, frozenset(name for name, _ in task.named_buffers()))

    def changed_requires_grad(self, task: nn.Module, ignored: Container[str]) -> dict[str, bool]:
        """Return ``requires_grad`` of each parameter that was frozen or freed since, by name.

        Args:
            task: the task now.
            ignored: the names of parameters to leave out.
        """
        return {
            name: parameter.requires_grad
            for name, parameter in task.named_parameters()
            if parameter.requires_grad != self.requires_grad.get(name, True) and name not in ignored
        }

    def new_buffers(self, task: nn.Module) -> list[str]:
        """Return the names of the buffers that came since."""
        return [name for name, _ in task.named_buffers() if name not in self.buffers]

    def watch_attributes(self, task: nn.Module) -> None:
        """Remember the values of the plain attributes, to compare with later."""
        self.attributes = _attributes(task)

    def changed_attributes(self, task: nn.Module) -> list[str]:
        """Return the plain attributes that changed since, and those that were lost before."""
        now = _attributes(task)
        changed = [n for n, v in now.items() if not _same(v, self.attributes.get(n, (None, None)))]
        return sorted({*self.lost, *changed})


def describe_lost(task: str, names: Sequence[str]) -> str:
    """Return the sentence for a resume whose checkpoint lacks attributes of the task."""
    shown = ", ".join(f"{task}.{name}" for name in names[:6])
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return (
        f"{shown}{more} changed during the saved run, and no checkpoint holds plain attributes: the "
        f"resumed run has the value of the constructor. {_REMEDY}, if a step depends on it"
    )


@contextmanager
def fixed_parameters(task: nn.Module, name: str) -> Iterator[None]:
    """Inside, a module of ``task`` takes no parameter that is new or has another name.

    torch calls the check where a module gets a parameter, so steps cost nothing.

    Args:
        task: the task, whose optimizers are made.
        name: its name in messages.

    Raises:
        TaskError: naming the parameter, at once.
    """
    paths = {id(module): path for path, module in task.named_modules()}
    before = {
        path: dict(module.named_parameters(remove_duplicate=False))
        for path, module in task.named_modules()
    }

    def check(module: nn.Module, attribute: str, found: Mapping[str, nn.Parameter]) -> None:
        path = paths.get(id(module))
        if path is None:
            return
        for leaf, parameter in found.items():
            known = before[path].get(leaf)
            # FSDP itself puts the gathered parameter in the place of its DTensor.
            if known is parameter or (known is not None and type(known) is not nn.Parameter):
                continue
            raise TaskError(
                f"{name}.{path + '.' if path else ''}{leaf} is {'another' if known is not None else 'a new'} "
                "parameter since the optimizers were made: no optimizer holds it, and a resume does "
                "not have it. Make it in __init__ or configure_model. To change values, copy into "
                "the parameter under torch.no_grad(). To compile, pass Fit(compile=True)"
            )

    def of_parameter(module: nn.Module, attribute: str, parameter: Any) -> None:
        if parameter is not None:
            check(module, attribute, {attribute: parameter})

    def of_module(module: nn.Module, attribute: str, part: Any) -> None:
        if part is not None and id(module) in paths:
            parameters = part.named_parameters()
            check(module, attribute, {f"{attribute}.{leaf}": p for leaf, p in parameters})

    handles = [
        register_module_parameter_registration_hook(of_parameter),
        register_module_module_registration_hook(of_module),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attributes(task: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return (kind, identity) of each plain attribute that may be state, by its path."""
    found = {}
    for path, module in task.named_modules():
        kind = type(module)
        if kind.__module__.partition(".")[0] in _LIBRARIES:
            continue
        if kind.get_extra_state is not nn.Module.get_extra_state or _saves_by_hand(kind):
            continue
        for name, value in vars(module).items():
            if name == "training" or name.startswith("_"):
                continue
            identity = _identity(value)
            if identity is not None:
                found[f"{path}.{name}" if path else name] = identity
    return found


def _saves_by_hand(kind: type) -> bool:
    """Return whether a LightningModule's class keeps state of its own in checkpoints."""
    return any(
        "on_save_checkpoint" in vars(base)
        and base.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
        for base in kind.__mro__
    )


def _identity(value: Any, depth: int = 0) -> tuple[Any, Any] | None:
    """Return what tells a value from the one before; None if such a value is no state."""
    if value is None:
        return None, None
    if isinstance(value, (bool, int, float, complex, np.generic)):
        return type(value), repr(value)
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        return (Tensor, (id(value), version)) if depth else (weakref.ref(value), version)
    if isinstance(value, torch.Generator):
        return torch.Generator, hashlib.sha256(value.get_state().numpy().tobytes()).digest()
    if isinstance(value, np.random.Generator):
        return np.random.Generator, repr(value.bit_generator.state)
    if isinstance(value, random.Random):
        return random.Random, value.getstate()
    if (
        isinstance(value, (list, tuple, deque, dict))
        and len(value) <= _LONGEST
        and depth < _DEEPEST
    ):
        parts = value.values() if isinstance(value, dict) else value
        inside = [_identity(part, depth + 1) for part in parts]
        return None if None in inside else (type(value), inside)
    if isinstance(value, np.ndarray) and value.nbytes <= _LARGEST and not value.dtype.hasobject:
        return np.ndarray, hashlib.sha256(np.ascontiguousarray(value).tobytes()).digest()
    return None


def _same(one: tuple[Any, Any], other: tuple[Any, Any]) -> bool:
    if isinstance(one[0], weakref.ref) and isinstance(other[0], weakref.ref):
        return one[0]() is other[0]() and one[1] == other[1]
    return one == other
