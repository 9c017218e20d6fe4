"""NoCollectives: what one rank does alone must not wait for the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from loopkit.errors import LoopkitError


class NoCollectives(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block in which a collective raises an error. Its rank would wait for the others without end.

    It sees what this thread does.

    Args:
        error: what is raised.
    """

    def __init__(self, error: LoopkitError) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.error = error

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call an operation of torch that is not a collective."""
        if func.namespace in ("c10d", "_c10d_functional"):
            raise self.error
        return func(*args, **(kwargs or {}))
