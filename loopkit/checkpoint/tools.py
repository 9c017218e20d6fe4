"""Tools for people who look at checkpoints: list, verify, compare and export them."""

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
    checkpoints_dir,
    dump_json,
    parse_name,
)
from loopkit.checkpoint.reader import read_checkpoint, verify_checkpoint
from loopkit.checkpoint.schema import check_state
from loopkit.checkpoint.snapshot import Snapshot
from loopkit.checkpoint.staging import removed_on_error, write_below
from loopkit.checkpoint.store import Store
from loopkit.errors import CheckpointError, OptionError

WEIGHTS = "model.safetensors"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTERS = "adapter_config.json"
ABOUT = "loopkit.json"
"""The file of an export that describes it, in the JSON of :mod:`loopkit.checkpoint.codecs`."""
ABOUT_TENSORS = "loopkit.safetensors"
"""The tensors and arrays among what that file describes."""


def list_checkpoints(run_dir: Path, store: Store | None = None, deep: bool = False) -> list[Entry]:
    """List the checkpoints of a run, oldest first.

    Args:
        deep: read every byte; otherwise only manifests and file sizes.
    """
    return scan(store or Store(), run_dir, deep)


def verify_tree(path: Path, store: Store | None = None) -> dict[Path, list[str]]:
    """Verify a checkpoint, or all those of a run directory or of a ``checkpoints`` directory.

    Returns:
        What is wrong, by checkpoint.

    Raises:
        FileNotFoundError: there is no checkpoint.
    """
    store = store or Store()
    found: list[Path] = []
    for parent in (checkpoints_dir(path), Path(path)):
        found = found or [parent / name for name in store.names(parent) if parse_name(name)]
    if not found and MANIFEST in store.names(Path(path)):
        found = [Path(path)]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {path}")
    return {checkpoint: _problems(store, checkpoint) for checkpoint in found}


def _problems(store: Store, path: Path) -> list[str]:
    try:
        return verify_checkpoint(store, path)
    except CheckpointError as error:
        return [str(error)]


@dataclass
class Diff:
    """The differences between two checkpoints. It is false if there are none.

    Attributes:
        added, removed: tensors, named "prefix:tensor".
        changed: by tensor, the largest absolute difference; None where dtype or shape differ, NaN
            where only one of them is NaN.
        state: by path into the state, the two values; an absent one is ``"<absent>"``.
    """

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    changed: dict[str, float | None] = field(default_factory=dict)
    state: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.state)


def diff_checkpoints(a: Path, b: Path, store: Store | None = None) -> Diff:
    """Return what changed from checkpoint ``a`` to checkpoint ``b``; both are verified first."""
    store = store or Store()
    before, after = read_checkpoint(store, a), read_checkpoint(store, b)
    old, new = _tensors(before), _tensors(after)
    found = Diff(sorted(new.keys() - old.keys()), sorted(old.keys() - new.keys()))
    for name in sorted(old.keys() & new.keys()):
        if not _same_tensor(old[name], new[name]):
            found.changed[name] = _distance(old[name], new[name])
    left, right = dict(_values(before)), dict(_values(after))
    for path in sorted(left.keys() | right.keys()):
        pair = left.get(path, "<absent>"), right.get(path, "<absent>")
        if (path in left) != (path in right) or not _same_value(*pair):
            found.state[path] = pair
    return found


def _tensors(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """Return all tensors of a snapshot, those of its state among them."""
    found = {
        f"{prefix}:{name}": tensor
        for prefix, named in snapshot.tensors.items()
        for name, tensor in named.items()
    }
    for path, value in _leaves(snapshot.state, ""):
        if isinstance(value, torch.Tensor):
            found[f"state:{path}"] = value
    return found


def _values(snapshot: Snapshot) -> Iterator[tuple[str, Any]]:
    return ((path, v) for path, v in _leaves(snapshot.state, "") if not isinstance(v, torch.Tensor))


def _same_value(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    # Compared by their text: there equal values of different types differ and NaN equals NaN.
    return type(a) is type(b) and repr(a) == repr(b)


def _same_tensor(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float | None:
    """Return the largest absolute difference; None if dtype or shape differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    gap = (a.to(wide) - b.to(wide)).abs()
    # Where both are NaN, or the same infinity, the value did not change.
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


def export_model(checkpoint: Path, out_dir: Path, store: Store | None = None) -> Path:
    """Verify a checkpoint, and write its model alone into a new directory for use anywhere.

    The directory gets ``model.safetensors``, the extra files, and ``loopkit.json`` with ``format``,
    ``step``, ``task`` (the name of the class), ``hparams`` (the arguments of its constructor) and,
    if a module has it, ``extra_state``. Tensors among these are in ``loopkit.safetensors``. If the
    extra files are those of adapters, the weights are in ``adapter_model.safetensors``, where peft
    looks for them; several adapters have a folder each.

    Raises:
        OptionError: ``out_dir`` exists and is not empty.
        CheckpointError: the checkpoint is corrupt, or holds no model.
    """
    store, out = store or Store(), Path(out_dir)
    if store.names(out) or (out.exists() and not out.is_dir()):
        raise OptionError(f"{out} exists already; export writes a new directory")
    snapshot = read_checkpoint(store, checkpoint)
    if not snapshot.tensors.get("model") and not snapshot.state.get("extra_state"):
        raise CheckpointError(f"{checkpoint} holds no model")
    check_state(snapshot.state, checkpoint, only=("task", "extra_state"))
    about, values = _about(snapshot)
    weights = _weight_files(snapshot)
    staging = out.parent / f"{STAGING}{secrets.token_hex(4)}"
    with removed_on_error(store, staging):
        store.mkdir(staging)
        for name, data in {**snapshot.files, ABOUT: about}.items():
            write_below(store, staging, name, data)
        for name, tensors in {**weights, **({ABOUT_TENSORS: values} if values else {})}.items():
            aliases = safetensors_io.find_aliases(tensors)
            stored = {name: tensor for name, tensor in tensors.items() if name not in aliases}
            with store.create(staging / name) as file:
                safetensors_io.write_tensors(file, stored, aliases)
        store.sync_dir(staging)
        store.rename(staging, out)
        store.sync_dir(out.parent)
    return out


def _weight_files(snapshot: Snapshot) -> dict[str, dict[str, torch.Tensor]]:
    """Return the weights by the path of the file that they are written to.

    The weights of one of several adapters have its folder before their names.
    """
    folders = [name[: -len(ADAPTERS)] for name in snapshot.files if name.endswith(f"/{ADAPTERS}")]
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in snapshot.tensors.get("model", {}).items():
        folder = next((each for each in folders if name.startswith(each)), "")
        file = ADAPTER_WEIGHTS if folder or ADAPTERS in snapshot.files else WEIGHTS
        found.setdefault(folder + file, {})[name.removeprefix(folder)] = tensor
    return found or {WEIGHTS: {}}


def _about(snapshot: Snapshot) -> tuple[bytes, dict[str, torch.Tensor]]:
    """Return the content of ``loopkit.json``, and the tensors that it names."""
    task, extra = snapshot.state.get("task", {}), snapshot.state.get("extra_state")
    about = {
        "format": "loopkit-export",
        "task": task.get("class"),
        "step": snapshot.meta["step"],
        "hparams": task.get("hparams", {}),
    }
    if extra:
        about["extra_state"] = extra
    tensors: dict[str, torch.Tensor] = {}
    text = dump_json(codecs.encode(about, "", tensors), sort=False)
    return text, tensors
