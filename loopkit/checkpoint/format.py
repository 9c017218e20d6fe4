"""What a checkpoint is: the snapshot, the names in a run directory, and strict JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from loopkit.errors import CorruptCheckpointError

FORMAT = "loopkit-checkpoint"
VERSION = 1
MIN_READER = 1
"""The oldest reader version that understands what this version writes."""

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
TENSORS = ".safetensors"
STAGING = ".staging-"
DELETING = ".deleting-"

MAX_JSON = 64 << 20
"""Bytes; the largest MANIFEST.json or state.json that is written or read."""

MAX_EXTRA = 1 << 30
"""Bytes; the largest extra file, which is held in memory as a whole."""

_STEP = re.compile(r"step-(\d{12,18})(?:-g([1-9]\d{0,8}))?")
_CORRUPT = re.compile(rf"{_STEP.pattern}\.corrupt-[1-9]\d*")


@dataclass(frozen=True)
class Shard:
    """This rank's box of a tensor that is spread over ranks.

    ``tensor`` is None where another rank writes the box, or it is empty; ``offset`` and ``shape``
    say where in the whole it lies and how large the whole is.
    """

    tensor: torch.Tensor | None
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass
class ShardedTensor:
    """A tensor that lies in several pieces in files, put together where it is asked for:
    ``pieces[box]``.

    ``pieces`` holds each one's offset in the whole and itself; they do not overlap, and leave
    nothing out.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[tuple[tuple[int, ...], torch.Tensor]]

    def __getitem__(self, box: tuple[slice, ...]) -> torch.Tensor:
        """What lies in ``box`` (a slice with start and stop for each dimension; none for all), in
        fresh memory.
        """
        box = box or tuple(slice(0, size) for size in self.shape)
        made = torch.empty([part.stop - part.start for part in box], dtype=self.dtype)
        for offset, piece in self.pieces:
            low = [max(part.start, at) for part, at in zip(box, offset)]
            high = [min(part.stop, at + size) for part, at, size in zip(box, offset, piece.shape)]
            if all(start < stop for start, stop in zip(low, high)):
                into = tuple(
                    slice(a - part.start, b - part.start) for a, b, part in zip(low, high, box)
                )
                made[into] = piece[
                    tuple(slice(a - at, b - at) for a, b, at in zip(low, high, offset))
                ]
        return made


@dataclass
class Snapshot:
    """Everything a checkpoint holds, in memory.

    ``tensors``: file stem ("model", "optimizer", "state") to tensor name to CPU tensor, to a Part
    when it is to be written, or to Pieces when it was read from a Store that maps; a stem with no
    tensors has no file. Names under one stem that share one storage are written once and come back
    as one tensor object. ``state``: Python values, see :mod:`loopkit.checkpoint.codecs` for the
    types. ``meta``: facts for the manifest, ``step`` (an int, from 0) among them; key order is not
    kept. ``files``: extra files by relative name.
    """

    tensors: dict[str, dict[str, Any]]
    state: dict[str, Any]
    meta: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


def step_name(step: int, generation: int = 1) -> str:
    """The directory name of a checkpoint; the second one of the same step has generation 2."""
    return f"step-{step:012d}" + ("" if generation == 1 else f"-g{generation}")


def parse_name(name: str) -> tuple[int, int] | None:
    """``(step, generation)`` of a checkpoint's directory name, ``None`` for any other name."""
    match = _STEP.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def is_quarantined(name: str) -> bool:
    """Whether ``name`` is a checkpoint that was found corrupt and set aside."""
    return _CORRUPT.fullmatch(name) is not None


def aside_name(name: str, why: str, taken: Collection[str]) -> str:
    """A name that is not a checkpoint's any more: ``name.why-N`` with the first N that is free."""
    number = 1
    while f"{name}.{why}-{number}" in taken:
        number += 1
    return f"{name}.{why}-{number}"


def checkpoints_dir(run_dir: Path | str) -> Path:
    """Where the checkpoints of a run are."""
    return Path(run_dir) / CHECKPOINTS


def safe_name(name: str) -> bool:
    """Whether ``name`` is a relative path that stays inside its directory, written in one way only."""
    parts = name.split("/")
    return (
        0 < len(name) <= 1024
        and "\\" not in name
        and "\0" not in name
        and ":" not in parts[0]
        and all(
            part not in ("", ".", "..") and len(part.encode("utf-8", "replace")) <= 255
            for part in parts
        )
    )


def dump_json(value: Any, sort: bool = True) -> bytes:
    """Compact strict JSON in ASCII. ``ValueError`` for NaN or infinity."""
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), allow_nan=False).encode("ascii")


def load_json(data: bytes | bytearray, what: str) -> Any:
    """Strict JSON: no NaN, no key twice, no nesting that exhausts the stack.

    Raises ``CorruptCheckpointError`` naming ``what``.
    """
    try:
        # Of bytes json would guess the encoding, and import the codec that they suggest.
        text = bytes(data).decode("utf-8")
        return json.loads(text, object_pairs_hook=_no_twice, parse_constant=_no_constant)
    except RecursionError:
        raise CorruptCheckpointError(f"{what}: nested too deeply") from None
    except ValueError as error:
        raise CorruptCheckpointError(f"{what}: not valid JSON ({error})") from None


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
