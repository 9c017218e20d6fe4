"""What each precision means for parameters, batches, the forward pass and the loss scaling."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from loopkit.errors import OptionError, nearest


@dataclass(frozen=True)
class Precision:
    """A value of ``Fit(precision=)``.

    Attributes:
        name: the value, as the user types it.
        autocast: the dtype that autocast casts operations to; None for no autocast.
        storage: the dtype of parameters and floating inputs; None leaves them as they are.
        scaled: whether a loss scaler keeps small fp16 gradients from vanishing.
        tf32: whether float32 matrices may be multiplied in TF32.
    """

    name: str
    autocast: torch.dtype | None = None
    storage: torch.dtype | None = None
    scaled: bool = False
    tf32: bool = False


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32"),
        Precision("tf32", tf32=True),
        Precision("bf16", autocast=torch.bfloat16),
        Precision("fp16", autocast=torch.float16, scaled=True),
        Precision("bf16-true", storage=torch.bfloat16),
        Precision("fp16-true", storage=torch.float16),
        Precision("fp64", storage=torch.float64),
    )
}


def parse_precision(name: object) -> Precision:
    """Return the precision of that name.

    Raises:
        OptionError: no precision has that name.
    """
    if name not in PRECISIONS:
        hint = nearest(str(name), PRECISIONS)
        raise OptionError(
            f"precision={name!r} is not known: give one of {', '.join(PRECISIONS)}.{hint}"
        )
    return PRECISIONS[str(name)]


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Inside, run float32 matrix products and convolutions in TF32 if ``precision`` says so.

    torch has the setting for the whole process. Devices without TF32 ignore it.

    Raises:
        OptionError: the script has set TF32 for single operations. Then torch cannot read the
            setting as a whole.
    """
    if not precision.tf32:
        yield
        return
    try:
        before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError as error:
        raise OptionError(
            "precision='tf32' sets what torch calls fp32_precision, and so does the script, for "
            f"some operations: leave one of them out ({str(error)[:60]}…)"
        ) from error
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class DefaultDtype(AbstractContextManager[None]):
    """Inside, new floating tensors have ``dtype``, so that they match the task's parameters."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._before: list[torch.dtype] = []

    def __enter__(self) -> None:
        self._before.append(torch.get_default_dtype())
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self._before.pop())


class Both(AbstractContextManager[None]):
    """Two contexts as one that can be entered many times."""

    def __init__(
        self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]
    ) -> None:
        self.outer, self.inner = outer, inner

    def __enter__(self) -> None:
        self.outer.__enter__()
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        self.outer.__exit__(*error)


def forward_context(
    precision: Precision, device: torch.device, *, offload: bool = False
) -> AbstractContextManager[Any] | None:
    """Return the context for each call of a task's step, to be entered many times; None for none.

    Args:
        offload: keep what the backward pass needs in the CPU's memory, pinned if the device is a
            GPU.
    """
    if offload:
        saved = torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
        around = forward_context(precision, device)
        return saved if around is None else Both(around, saved)
    if precision.autocast is not None:
        return torch.autocast(device.type, precision.autocast)
    if precision.storage is not None:
        return DefaultDtype(precision.storage)
    return None
