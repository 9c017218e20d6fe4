"""Snapshot: everything a checkpoint holds, in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shard:
    """This rank's part of a tensor that is sharded over ranks: a box in the whole tensor.

    Attributes:
        tensor: the values of the box; None where another rank writes the box, or it is empty.
        offset: the index of the box's first element in the whole tensor.
        shape: the shape of the whole tensor.
    """

    tensor: torch.Tensor | None
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class ShardedTensor:
    """A tensor in several pieces, assembled when a box of it is read: ``tensor[box]``.

    Attributes:
        shape, dtype: of the whole tensor.
        pieces: (offset in the whole tensor, values); the pieces cover it exactly once.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[tuple[int, ...], torch.Tensor]]

    def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
        """Return a copy of the elements in ``box``.

        Args:
            box: a slice with start and stop for each dimension; ``()`` for the whole tensor.
        """
        box = box or tuple(slice(0, size) for size in self.shape)
        result = torch.empty([part.stop - part.start for part in box], dtype=self.dtype)
        for offset, piece in self.pieces:
            low = [max(part.start, at) for part, at in zip(box, offset)]
            high = [min(part.stop, at + size) for part, at, size in zip(box, offset, piece.shape)]
            if all(start < stop for start, stop in zip(low, high)):
                into = [slice(a - part.start, b - part.start) for a, b, part in zip(low, high, box)]
                source = [slice(a - at, b - at) for a, b, at in zip(low, high, offset)]
                result[tuple(into)] = piece[tuple(source)]
        return result


@dataclass
class Snapshot:
    """Everything a checkpoint holds, in memory.

    Attributes:
        tensors: file prefix ("model", "optimizer", "state") to tensor name to CPU tensor. A tensor
            to be written may be a Shard; one that a Store with ``maps`` read may be a
            ShardedTensor. A prefix without tensors has no file. Names of one prefix that share one
            storage are written once, and are one tensor object again when they are read.
        state: Python values of the types that :mod:`loopkit.checkpoint.codecs` lists.
        meta: facts for the manifest, among them ``step``, an int from 0. Their order is not kept.
        files: the content of extra files by relative name.
        logs: files of the run's loggers. They become durable before the checkpoint does; they are
            no part of it.
    """

    tensors: dict[str, dict[str, Any]]
    state: dict[str, Any]
    meta: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)
    logs: tuple[Path, ...] = ()
