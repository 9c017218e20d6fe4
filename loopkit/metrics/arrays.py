"""Arrays of the batches of a pass: brought to one shape, and concatenated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

PADDING = -100
"""Fills the rows of batches that are shorter than the longest, as torch's losses ignore it."""
_SIGNED = {"uint8": "int16", "uint16": "int32", "uint32": "int64"}


def plain_tensor(tensor: Tensor) -> Any:
    """Return a dense tensor; a nested one as the list of its samples."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    return tensor.dequantize() if tensor.is_quantized else tensor


def to_array(value: Any) -> Any:
    """Return a NumPy array; one in single precision of a type that NumPy does not have."""
    if not isinstance(value, Tensor):
        return value
    coarse = value.is_floating_point() and value.dtype not in (torch.float32, torch.float64)
    return (value.float() if coarse else value.resolve_conj().resolve_neg()).numpy()


def unsqueezed(array: Any, full: Any, size: int) -> Any:
    """Return the array of a batch of one with the dimensions that squeeze() dropped from it."""
    if size != 1 or array.ndim == full.ndim:
        return array
    if array.ndim == full.ndim - 1:
        return array[None]
    rest = tuple(full.shape[1:])
    return array.reshape((1, *rest)) if np.prod(rest) == np.prod(array.shape) else array


def stack(arrays: list[Any]) -> Any:
    """Return scalars of several batches as one array."""
    return torch.stack(arrays) if isinstance(arrays[0], Tensor) else np.stack(arrays)


def concatenate(arrays: list[Any]) -> Any:
    """Return arrays of several batches as one, along dimension 0."""
    return torch.cat(arrays) if isinstance(arrays[0], Tensor) else np.concatenate(arrays)


def padded_rows(array: Any, shape: list[int]) -> Any:
    """Return the array with its rows padded to ``shape``, in a type that holds the padding.

    Raises:
        TypeError: no such type is known.
    """
    library: Any = torch if isinstance(array, Tensor) else np
    name = str(array.dtype).removeprefix("torch.")
    if name == "uint64" or (library is np and array.dtype.kind not in "biufc"):
        raise TypeError(name)
    kind = getattr(library, _SIGNED.get(name, name))
    filler = False if name == "bool" else PADDING
    padded = library.full((len(array), *shape), filler, dtype=kind)
    padded[tuple(map(slice, array.shape))] = array
    return padded
