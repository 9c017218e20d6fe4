"""The names of a checkpoint's files and directories, and strict JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from loopkit.errors import CorruptCheckpointError

FORMAT = "loopkit-checkpoint"
VERSION = 2
MIN_READER = 2
"""The oldest reader version that understands what this version writes."""

CHECKPOINTS = "checkpoints"
LATEST = "latest"
MANIFEST = "MANIFEST.json"
STATE = "state.json"
TENSORS = ".safetensors"
SHARDS = "shards"
STAGING = ".staging-"
DELETING = ".deleting-"

MAX_JSON = 64 << 20
"""The most bytes of a MANIFEST.json or state.json that is written or read."""

MAX_EXTRA = 1 << 30
"""The most bytes of an extra file, which is held in memory as a whole."""

_STEP = re.compile(r"step-(\d{12,18})(?:-g([1-9]\d{0,8}))?")
_CORRUPT = re.compile(rf"{_STEP.pattern}\.corrupt-[1-9]\d*")


def step_name(step: int, generation: int = 1) -> str:
    """Return a checkpoint's directory name; the second checkpoint of a step has generation 2."""
    return f"step-{step:012d}" + ("" if generation == 1 else f"-g{generation}")


def parse_name(name: str) -> tuple[int, int] | None:
    """Return ``(step, generation)`` of a checkpoint's directory name; None for any other name."""
    match = _STEP.fullmatch(name)
    return (int(match[1]), int(match[2] or 1)) if match else None


def is_quarantined(name: str) -> bool:
    """Return whether ``name`` is that of a checkpoint that was renamed because it is corrupt."""
    return _CORRUPT.fullmatch(name) is not None


def aside_name(name: str, reason: str, taken: Collection[str]) -> str:
    """Return ``name.reason-N`` with the first N that is free: not a checkpoint's name any more."""
    number = 1
    while f"{name}.{reason}-{number}" in taken:
        number += 1
    return f"{name}.{reason}-{number}"


def checkpoints_dir(run_dir: Path | str) -> Path:
    """Return the directory that holds the checkpoints of a run."""
    return Path(run_dir) / CHECKPOINTS


def safe_name(name: str) -> bool:
    """Return whether ``name`` is a relative path inside its directory, in its only spelling."""
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
    """Return compact strict JSON in ASCII.

    Raises:
        ValueError: the value holds NaN or infinity.
    """
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), allow_nan=False).encode("ascii")


def load_json(data: bytes | bytearray, what: str) -> Any:
    """Parse strict JSON: no NaN, no key twice, no nesting that exhausts the stack.

    Raises:
        CorruptCheckpointError: it is not valid; the message names ``what``.
    """
    try:
        # From bytes, json would guess the encoding and import the codec that the guess names.
        text = bytes(data).decode("utf-8")
        return json.loads(
            text,
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse,
            parse_float=_finite,
        )
    except RecursionError:
        raise CorruptCheckpointError(f"{what}: nested too deeply") from None
    except ValueError as error:
        raise CorruptCheckpointError(f"{what}: not valid JSON ({error})") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is out of range")
    return value


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
