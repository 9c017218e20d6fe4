"""The dtypes that a precision stores tensors in."""

from __future__ import annotations

import torch

_COMPLEX = {torch.float64: torch.complex128}


def stored_dtype(dtype: torch.dtype, storage: torch.dtype | None) -> torch.dtype:
    """Return what a tensor of ``dtype`` is converted to where floating ones become ``storage``.

    Complex tensors stay complex: under float64 they become complex128, and otherwise they keep their
    dtype, since torch trains no complex numbers of two 16-bit parts. Integers keep theirs.

    Args:
        storage: None converts nothing.
    """
    if storage is not None and dtype.is_floating_point:
        return storage
    return _COMPLEX.get(storage, dtype) if storage is not None and dtype.is_complex else dtype
