"""What people ask of checkpoints: list, verify, compare, export."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopkit.checkpoint import codecs, safetensors_io
from loopkit.checkpoint.discovery import Entry, scan
from loopkit.checkpoint.format import (
    MANIFEST,
    STAGING,
    Snapshot,
    checkpoints_dir,
    dump_json,
    parse_name,
)
from loopkit.checkpoint.reader import read
from loopkit.checkpoint.reader import verify as verify_one
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.writer import removed_on_error
from loopkit.errors import CheckpointError, OptionError

WEIGHTS, ADAPTER_WEIGHTS, ADAPTERS = (
    "model.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
)
ABOUT = "loopkit.json"
"""What an export says about itself, in the JSON of :mod:`loopkit.checkpoint.codecs`."""


def ls(run_dir: Path, store: Store | None = None, deep: bool = False) -> list[Entry]:
    """The checkpoints of a run, oldest first; ``deep`` reads every byte, otherwise manifests and
    sizes.
    """
    return scan(store or Store(), run_dir, deep)


def verify_tree(path: Path, store: Store | None = None) -> dict[Path, list[str]]:
    """What is wrong, by checkpoint, for a run directory, a ``checkpoints`` directory or one
    checkpoint.

    ``FileNotFoundError`` when there is none.
    """
    door = store or Store()
    found: list[Path] = []
    for parent in (checkpoints_dir(path), Path(path)):
        found = found or [parent / name for name in door.names(parent) if parse_name(name)]
    if not found and MANIFEST in door.names(Path(path)):
        found = [Path(path)]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {path}")
    return {each: _problems(door, each) for each in found}


def _problems(store: Store, path: Path) -> list[str]:
    try:
        return verify_one(store, path)
    except CheckpointError as error:
        return [str(error)]


@dataclass
class Diff:
    """How two checkpoints differ; names are "prefix:tensor" and paths into the state.

    ``changed``: the largest absolute difference, ``None`` where dtype or shape differ, NaN where
    only one side is NaN. ``state``: path to the two values, an absent one as ``"<absent>"``.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: dict[str, float | None] = field(default_factory=dict)
    state: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.state)


def diff(a: Path, b: Path, store: Store | None = None) -> Diff:
    """What changed from checkpoint ``a`` to checkpoint ``b``; both are verified first."""
    door = store or Store()
    before, after = read(door, a), read(door, b)
    old, new = _flat(before), _flat(after)
    found = Diff(sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys()))
    for name in sorted(old.keys() & new.keys()):
        if not _same(old[name], new[name]):
            found.changed[name] = _distance(old[name], new[name])
    left, right = dict(_values(before)), dict(_values(after))
    for path in sorted(left.keys() | right.keys()):
        pair = left.get(path, "<absent>"), right.get(path, "<absent>")
        if (path in left) != (path in right) or not _same_value(*pair):
            found.state[path] = pair
    return found


def _flat(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    found = {
        f"{prefix}:{name}": t
        for prefix, named in snapshot.tensors.items()
        for name, t in named.items()
    }
    within = {
        f"state:{path}": v for path, v in _leaves(snapshot.state, "") if isinstance(v, torch.Tensor)
    }
    return {**found, **within}


def _values(snapshot: Snapshot) -> Iterator[tuple[str, Any]]:
    return ((path, v) for path, v in _leaves(snapshot.state, "") if not isinstance(v, torch.Tensor))


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    # Of equal values the text differs where the type does, and NaN reads as NaN.
    return type(a) is type(b) and repr(a) == repr(b)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float | None:
    if a.dtype != b.dtype or a.shape != b.shape:
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.to(wide) - b.to(wide)).abs()
    # Where both are NaN, or the same infinity, nothing changed in value.
    both = (a.to(wide) == b.to(wide)) | (a.to(wide).isnan() & b.to(wide).isnan())
    return float(gap.masked_fill(both, 0.0).max())


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple | deque) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def export(checkpoint: Path, out_dir: Path, store: Store | None = None) -> Path:
    """The model alone, for use anywhere: ``model.safetensors``, the extra files, and
    ``loopkit.json``.

    Where the extra files are those of adapters, the weights are in ``adapter_model.safetensors``,
    as peft opens them.

    ``loopkit.json`` has ``task`` (the class's name) and ``hparams`` (its constructor's arguments),
    ``step`` and ``format``. The checkpoint is verified first. ``OptionError`` when ``out_dir``
    exists and is not empty, ``CheckpointError`` when there is no model in the checkpoint.
    """
    door, out = store or Store(), Path(out_dir)
    if door.names(out) or (out.exists() and not out.is_dir()):
        raise OptionError(f"{out} exists already; export writes a new directory")
    snapshot = read(door, checkpoint)
    model = snapshot.tensors.get("model")
    if not model:
        raise CheckpointError(f"{checkpoint} holds no model")
    task = snapshot.state.get("task", {})
    about = {
        "format": "loopkit-export",
        "task": task.get("class"),
        "step": snapshot.meta["step"],
        "hparams": task.get("hparams", {}),
    }
    tensors: dict[str, torch.Tensor] = {}
    text = dump_json(codecs.encode(about, "", tensors), sort=False)
    if tensors:
        raise CheckpointError(
            f"{checkpoint}: {sorted(tensors)[0]} is a tensor, which {ABOUT} cannot hold"
        )
    staging = out.parent / f"{STAGING}{secrets.token_hex(4)}"
    with removed_on_error(door, staging):
        door.mkdir(staging)
        aliases = safetensors_io.find_aliases(model)
        with door.create(
            staging / (WEIGHTS if ADAPTERS not in snapshot.files else ADAPTER_WEIGHTS)
        ) as sink:
            safetensors_io.write(
                sink, {name: t for name, t in model.items() if name not in aliases}, aliases
            )
        for name, data in {**snapshot.files, ABOUT: text}.items():
            door.write_below(staging, name, data)
        door.sync_dir(staging)
        door.rename(staging, out)
        door.sync_dir(out.parent)
    return out
