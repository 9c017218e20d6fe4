"""MemoryTimeline: which storages are alive at each moment of a step, and what each of them is for."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from loopkit.nested import leaves
from loopkit.sharded import is_sharded, local_tensor

KINDS = ("parameters", "gradients", "optimizer state", "activations", "communication", "update")
# What allocates: a part of the path of the innermost frame that is none of torch's dispatch.
_OWNERS = {
    "/torch/distributed/fsdp/": "communication",
    "/torch/nn/parallel/": "communication",
    "/torch/distributed/_functional_collectives": "communication",
    "/torch/distributed/distributed_c10d": "communication",
    "/torch/optim/": "update",
    "/loopkit/optim/": "update",
}
_DISPATCH = (
    "/torch/_ops.py",
    "/torch/_tensor.py",
    "/torch/_compile.py",
    "/torch/_dynamo/",
    "/torch/_library/",
    "/torch/utils/",
    "/torch/autograd/",
    "/torch/distributed/tensor/",
    "/loopkit/plan/",
)


# What an offloading strategy keeps in the memory of the host; it is not part of a peak.
HOST = "host"


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which a device has most memory in use.

    Attributes:
        bytes: the bytes in use then, by ``KINDS``.
        host: the bytes that are kept in the memory of the host.
    """

    bytes: Mapping[str, int]
    host: int = 0

    @property
    def total(self) -> int:
        """The bytes of all kinds."""
        return sum(self.bytes.values())


class MemoryTimeline(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the storages of tensors from allocation to release; enter it around steps.

    It sees what torch's operators return, and what they are given that was there before. It does
    not see the temporary memory inside of one operator. Under a FakeTensorMode the storages have
    sizes and no memory; without one they are real.

    Args:
        updates_on_host: whether optimizers compute on the host.
    """

    def __init__(self, *, updates_on_host: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._update = HOST if updates_on_host else "update"
        self._numbers: Any = WeakIdKeyDictionary()
        self._references: dict[int, Any] = {}
        self._count = itertools.count()
        self._kinds: dict[int, str] = {}
        self._sizes: dict[int, int] = {}  # of the storages that are alive
        self._changes: list[tuple[int, int]] = []
        self._mode: Any = None
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> MemoryTimeline:
        self._mode = active_fake_mode()
        timeline, resize = self, self._resize

        # FSDP frees and allocates its whole parameters by this method, which is no operator.
        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            number = timeline._numbers.get(storage)
            if number is not None:
                timeline._change(number, storage.nbytes())

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and look at its tensors."""
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # a sharded tensor calls the operator again for its part
        kwargs = kwargs or {}
        # Sharded tensors find the shapes of their results in a mode of their own.
        counts = active_fake_mode() is self._mode
        if counts:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    is_parameter = isinstance(value, nn.Parameter)
                    self._see(value, "parameters" if is_parameter else "activations")
        if func is torch.ops._c10d_functional.wait_tensor.default and self._mode is not None:
            return args[0]  # its fake returns a new tensor
        result = func(*args, **kwargs)
        if counts:
            kind = ""
            for value in tree_leaves(result):
                if isinstance(value, Tensor):
                    kind = kind or _owner()
                    self._see(value, self._update if kind == "update" else kind)
        return result

    def note(self, kind: str, tensors: Iterable[Any]) -> None:
        """Say what tensors are for, sharded ones by their parts; those without memory are left out."""
        for tensor in tensors:
            number = self._see(local_tensor(tensor), kind)
            if number is not None:
                self._kinds[number] = kind

    def _see(self, tensor: Tensor, kind: str) -> int | None:
        if is_sharded(tensor) or tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()
        number: int | None = self._numbers.get(storage)
        if number is None:
            number = next(self._count)
            self._numbers[storage] = number
            self._references[number] = weakref.ref(storage, self._release(number))
            self._kinds[number] = kind
            self._change(number, storage.nbytes())
        return number

    def _release(self, number: int) -> Any:
        def release(reference: Any) -> None:
            self._change(number, 0)
            self._references.pop(number, None)

        return release

    def _change(self, number: int, size: int) -> None:
        self._sizes[number] = size
        self._changes.append((number, size))
        if not size:
            del self._sizes[number]

    @contextmanager
    def step(self) -> Iterator[list[Peak]]:
        """Inside is one step; afterwards the list holds its peak."""
        sizes = dict(self._sizes)
        self._changes.clear()
        found: list[Peak] = []
        yield found
        found.append(self._peak(sizes))

    def _peak(self, sizes: dict[int, int]) -> Peak:
        """Return the peak of the changes since ``sizes`` were the storages alive."""
        kinds = self._kinds
        now = most = sum(size for number, size in sizes.items() if kinds[number] != HOST)
        held, at = dict(sizes), 0
        for place, (number, size) in enumerate(self._changes, 1):
            if kinds[number] != HOST:
                now += size - held.get(number, 0)
                held[number] = size
                if now > most:
                    most, at = now, place
        for number, size in self._changes[:at]:
            sizes[number] = size
        by_kind = dict.fromkeys((*KINDS, HOST), 0)
        for number, size in sizes.items():
            by_kind[kinds[number]] += size
        return Peak(by_kind, by_kind.pop(HOST))


def _owner() -> str:
    """Return what the code that called an operator allocates for."""
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if not any(part in path for part in _DISPATCH):
            return next((kind for part, kind in _OWNERS.items() if part in path), "activations")
        frame = frame.f_back  # type: ignore[assignment]
    return "activations"


def tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors in nested dicts, lists and tuples."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]
