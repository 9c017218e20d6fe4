"""Writing a checkpoint: staged, synced, checked, renamed. Earlier checkpoints are never touched."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopkit.checkpoint import codecs, safetensors_io
from loopkit.checkpoint.format import (
    LATEST,
    MANIFEST,
    MAX_EXTRA,
    MAX_JSON,
    STATE,
    TENSORS,
    checkpoints_dir,
    dump_json,
    parse_name,
    safe_name,
    step_name,
)
from loopkit.checkpoint.manifest import (
    Chunk,
    FileRecord,
    Manifest,
    TensorRecord,
    check_coverage,
    meta_json,
)
from loopkit.checkpoint.snapshot import Snapshot
from loopkit.checkpoint.staging import removed_on_error, staging_name, write_below
from loopkit.checkpoint.store import Store
from loopkit.errors import CheckpointError, LoopkitError, LoopkitWarning

logger = logging.getLogger(__name__)


@dataclass
class PendingCheckpoint:
    """A snapshot that is ready to be written: its state as JSON, all its tensors by file prefix."""

    tensors: dict[str, dict[str, Any]]
    state: bytes
    meta: dict[str, object]
    files: dict[str, bytes] = field(default_factory=dict)
    logs: tuple[Path, ...] = ()


def prepare(snapshot: Snapshot) -> PendingCheckpoint:
    """Encode the state of a snapshot and check that everything in it can be saved.

    The state's tensors get the file prefix "state". Tensors are not copied.

    Raises:
        TypeError: a value or tensor cannot be saved; with its path.
        ValueError: a name cannot be used, or a part is too large.
    """
    tensors = {prefix: dict(named) for prefix, named in snapshot.tensors.items()}
    state_tensors = tensors.setdefault("state", {})
    state = dump_json(codecs.encode(snapshot.state, "", state_tensors), sort=False)
    if len(state) > MAX_JSON:
        raise ValueError(f"{STATE} would have {len(state)} bytes; keep large values in tensors")
    for prefix, named in tensors.items():
        if not safe_name(prefix) or "/" in prefix:
            raise ValueError(f"{prefix!r} cannot be the name of a file")
        for name, tensor in named.items():
            safetensors_io.check_tensor(f"{prefix} tensor {name!r}", tensor)
    tensors = {prefix: named for prefix, named in tensors.items() if named}
    meta_json(snapshot.meta)
    taken = {MANIFEST, STATE, *(prefix + TENSORS for prefix in tensors)}
    for name in snapshot.files:
        if not safe_name(name) or name in taken:
            raise ValueError(f"{name!r} cannot be the name of an extra file")
        if len(snapshot.files[name]) > MAX_EXTRA:
            raise ValueError(f"{name!r} has more than {MAX_EXTRA} bytes")
    return PendingCheckpoint(
        tensors, state, dict(snapshot.meta), dict(snapshot.files), snapshot.logs
    )


def write_checkpoint(store: Store, run_dir: Path, snapshot: Snapshot | PendingCheckpoint) -> Path:
    """Save one checkpoint under ``run_dir`` and return its directory, which is durable.

    What the snapshot's ``logs`` hold now is durable first: no log may lack what a checkpoint has
    passed. A step that is there already gets the next generation. On any failure the staging directory is
    removed, and earlier checkpoints are intact.

    Raises:
        DiskFullError, RunDirError, CheckpointError: as the store.
        TypeError, ValueError: as :func:`prepare`.
    """
    pending = snapshot if isinstance(snapshot, PendingCheckpoint) else prepare(snapshot)
    parent = checkpoints_dir(run_dir)
    store.mkdir(parent)
    staging = parent / staging_name()
    with removed_on_error(store, staging):
        store.mkdir(staging)
        manifest = write_files(store, staging, pending)
        sync_logs(store, run_dir, pending.logs)
        final, digest = publish(store, staging, manifest)
    point_latest(store, final, manifest, digest)
    return final


def sync_logs(store: Store, run_dir: Path, logs: Iterable[Path]) -> None:
    """Make log files durable, and the entries of ``run_dir`` and of the folders that they lie in.

    Warns where a log cannot be made durable. An error of the run directory itself is raised.
    """
    folders = {run_dir}
    for log in logs:
        try:
            store.sync_file(log)
            inside = [folder for folder in log.parents if folder.is_relative_to(run_dir)]
            folders.update(inside or [log.parent])
        except LoopkitError as error:
            warnings.warn(
                f"{error} Rows of this log can be lost in a power loss.",
                LoopkitWarning,
                stacklevel=2,
            )
    for folder in sorted(folders, reverse=True):
        store.sync_dir(folder)


def publish(
    store: Store, staging: Path, manifest: Manifest, generation: int | None = None
) -> tuple[Path, str]:
    """Give a staged checkpoint its manifest and its name, durably.

    Args:
        store: does the file operations.
        staging: the directory that holds everything but the manifest.
        manifest: of what it holds.
        generation: of this step; None takes the next one.

    Returns:
        The checkpoint's directory, and the digest of its manifest.
    """
    parent = staging.parent
    manifest.generation = generation or next_generation(store, parent, manifest)
    final = parent / step_name(manifest.meta["step"], manifest.generation)
    digest = _commit(store, staging, final, manifest)
    logger.info("saved checkpoint %s", final)
    return final, digest


def write_files(store: Store, staging: Path, pending: PendingCheckpoint) -> Manifest:
    """Write everything but the manifest, and return the manifest."""
    manifest = Manifest(dict(pending.meta), 1, {}, {}, {})
    for prefix, named in pending.tensors.items():
        path = prefix + TENSORS
        aliases = safetensors_io.find_aliases(named)
        written = {name: tensor for name, tensor in named.items() if name not in aliases}
        with store.create(staging / path, safetensors_io.data_size(written)) as file:
            # Recorded as by safetensors' save_model, so that its load_model finds tied weights.
            specs = safetensors_io.write_tensors(file, written, aliases)
        manifest.files[path] = FileRecord(path, file.size, file.digest)
        manifest.tensors[prefix] = {
            name: TensorRecord(
                spec.dtype,
                spec.shape,
                (Chunk(path, (0,) * len(spec.shape), spec.shape, spec.digest),),
            )
            for name, spec in specs.items()
        }
        manifest.aliases.update({prefix: aliases} if aliases else {})
    for name, data in {STATE: pending.state, **pending.files}.items():
        file = write_below(store, staging, name, data)
        manifest.files[name] = FileRecord(name, file.size, file.digest)
    return manifest


def next_generation(store: Store, parent: Path, manifest: Manifest) -> int:
    """Return the generation of a new checkpoint of a step: 1, or one more than the newest there."""
    found = [key for name in store.names(parent) if (key := parse_name(name))]
    step = manifest.meta["step"]
    return 1 + max((key[1] for key in found if key[0] == step), default=0)


def _commit(store: Store, staging: Path, final: Path, manifest: Manifest) -> str:
    """Write the manifest, rename the staging directory, and return the manifest's digest."""
    try:
        check_coverage(manifest)
    except ValueError as error:
        raise CheckpointError(f"not saved: {error}") from None
    file = store.write_bytes(staging / MANIFEST, manifest.dump())
    store.sync_dir(staging)
    store.rename(staging, final)
    store.sync_dir(final.parent)
    return file.digest


def point_latest(store: Store, final: Path, manifest: Manifest, digest: str) -> None:
    """Name the newest checkpoint in the file ``latest``, which is replaced atomically."""
    parent = final.parent
    temporary = parent / staging_name()
    try:
        store.write_bytes(temporary, latest_json(final.name, manifest, digest))
        store.rename(temporary, parent / LATEST)
        store.sync_dir(parent)
    except BaseException:
        with suppress(LoopkitError, OSError):
            store.remove(temporary)
        raise


def latest_json(name: str, manifest: Manifest, digest: str) -> bytes:
    """Return the content of ``latest``, given a checkpoint's name and its manifest's digest."""
    body = {
        "dir": name,
        "step": manifest.meta["step"],
        "generation": manifest.generation,
        "digest": digest,
    }
    return dump_json(body)
