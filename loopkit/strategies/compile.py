"""torch.compile for a task's steps or blocks, without compiling again for a shorter batch."""

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
    """How to use ``torch.compile``.

    Attributes:
        mode, backend, dynamic: arguments of ``torch.compile``; None is its default.
        scope: "step" compiles each step of the task as a whole. "blocks" compiles each repeated
            block by itself, which takes less time. A block cannot know which dimension is the
            batch, so the first shorter batch compiles it once more.
    """

    mode: str | None = None
    backend: str = "inductor"
    scope: Literal["step", "blocks"] = "step"
    dynamic: bool | None = None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``torch.compile``."""
        return {"mode": self.mode, "backend": self.backend, "dynamic": self.dynamic}


def compile_blocks(task: nn.Module, settings: Compile) -> None:
    """Compile each repeated block of ``task`` in place; parameter names stay as they are.

    Raises:
        OptionError: all blocks are of classes of ``torch.nn``, which torch does not compile in
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
            "class of its own; pass scope='step'"
        )
    for block in blocks:
        block.compile(**settings.options())


def compiled(method: Callable[..., Any], settings: Compile) -> Callable[..., Any]:
    """Return ``method``, which takes a batch, compiled once for all batch sizes above 1.

    The first dimension of every tensor in a batch is marked as dynamic, so that the shorter last
    batch of an epoch compiles nothing again. If this machine lacks a C++ compiler, the result warns
    once and calls the method as it is.
    """
    inner = torch.compile(method, **settings.options())
    state = {"can_compile": True, "has_run": False}

    def call(batch: Any) -> Any:
        if not state["can_compile"]:
            return method(batch)
        if settings.dynamic is not False:
            map_tensors(_mark_dynamic, batch)
        if state["has_run"]:
            return inner(batch)
        try:
            returned = inner(batch)
        except Exception as error:
            if "compiler" not in str(error).lower():
                raise
            warnings.warn(
                f"compile: {type(error).__name__}: {str(error).splitlines()[0]}. The run continues "
                "without compiling; install a C++ compiler (g++), or pass compile=False",
                LoopkitWarning,
                stacklevel=2,
            )
            state["can_compile"] = False
            return method(batch)
        state["has_run"] = True
        return returned

    return call


def _mark_dynamic(tensor: Tensor) -> Tensor:
    if tensor.ndim and tensor.shape[0] > 1:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensor
