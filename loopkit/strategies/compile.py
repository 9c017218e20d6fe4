"""torch.compile as an option: a task's step whole or block by block, without compiling again for a
ragged batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loopkit.errors import LoopkitWarning, OptionError
from loopkit.keywords import checks_keywords
from loopkit.nested import map_tensors
from loopkit.strategies.activation_checkpointing import repeated_blocks


@checks_keywords
@dataclass(frozen=True)
class Compile:
    """How ``torch.compile`` is used.

    Attributes:
        mode, backend, dynamic: handed to ``torch.compile``; None is its default.
        scope: "step" compiles the task's step whole; "blocks" compiles each repeated block by
            itself, which is quicker to compile. A block does not know which dimension is the
            batch's, so it is compiled once more when a shorter batch first comes; the step is not.
    """

    mode: str | None = None
    backend: str = "inductor"
    scope: Literal["step", "blocks"] = "step"
    dynamic: bool | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments for ``torch.compile``."""
        return {"mode": self.mode, "backend": self.backend, "dynamic": self.dynamic}


def compile_blocks(task: nn.Module, how: Compile) -> None:
    """Compile each repeated block of ``task`` in place; parameter names stay as they are.

    Raises:
        OptionError: no block is of a class outside ``torch.nn``, which torch does not compile in
            place.
    """
    blocks = [
        block
        for block in repeated_blocks(task)
        if not type(block).__module__.startswith("torch.nn")
    ]
    if not blocks:
        raise OptionError(
            f"compile=Compile(scope='blocks'): {type(task).__name__} has no repeated block of a "
            f"class of "
            "its own; pass scope='step'"
        )
    for block in blocks:
        block.compile(**how.options())


def compiled(method: Callable[..., Any], how: Compile) -> Callable[..., Any]:
    """``method`` (of a batch) compiled, once for all batch sizes above 1.

    The first dimension of every tensor in a batch is announced as one that varies, so that the
    shorter last batch of an epoch compiles nothing anew. Where the compiler cannot run at all (no
    C++ compiler), it is said once and the method runs as it is.
    """
    inner = torch.compile(method, **how.options())
    state = {"call": inner, "proven": False}

    def call(batch: Any) -> Any:
        if state["call"] is method:
            return method(batch)
        if how.dynamic is not False:
            map_tensors(_varies, batch)
        if state["proven"]:
            return inner(batch)
        try:
            returned = inner(batch)
        except Exception as error:
            if "compiler" not in str(error).lower():
                raise
            warnings.warn(
                f"compile: {type(error).__name__}: {str(error).splitlines()[0]}. Going on without "
                "compiling; install a C++ compiler (g++), or pass compile=False",
                LoopkitWarning,
                stacklevel=2,
            )
            state["call"] = method
            return method(batch)
        state["proven"] = True
        return returned

    return call


def _varies(tensor: Tensor) -> Tensor:
    if tensor.ndim and tensor.shape[0] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor
