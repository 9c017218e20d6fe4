"""Writing one checkpoint from several ranks: each writes its shards, and it is published as one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loopkit.checkpoint import safetensors_io
from loopkit.checkpoint.format import SHARDS, TENSORS, checkpoints_dir
from loopkit.checkpoint.manifest import Chunk, FileRecord, Manifest, TensorRecord
from loopkit.checkpoint.snapshot import Shard, Snapshot
from loopkit.checkpoint.staging import removed_on_error, staging_name
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.writer import (
    PendingCheckpoint,
    point_latest,
    prepare,
    publish,
    sync_logs,
    write_files,
)
from loopkit.errors import LoopkitError

if TYPE_CHECKING:
    from loopkit.distributed.communicator import Communicator


@dataclass
class RankFiles:
    """The files that one rank wrote, or its error.

    Attributes:
        files: of its shards.
        records: the chunks in these files, by prefix and tensor.
        aliases: shards that share memory, as in the manifest.
        manifest: of everything but the shards; rank 0 alone has it.
        error: the reason why the rank wrote nothing.
    """

    files: list[FileRecord] = field(default_factory=list)
    records: dict[str, dict[str, TensorRecord]] = field(default_factory=dict)
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)
    manifest: Manifest | None = None
    error: Exception | None = None


def write_sharded(
    store: Store, run_dir: Path, snapshot: Snapshot | PendingCheckpoint, communicator: Communicator
) -> Path:
    """Save one checkpoint from all ranks, and return its directory.

    Every rank calls this. Each writes its own shards; rank 0 writes everything else. If anything
    fails on any rank, the staging directory is removed and all ranks raise the same error.
    """
    pending = snapshot if isinstance(snapshot, PendingCheckpoint) else prepare(snapshot)
    parent = checkpoints_dir(run_dir)

    def stage() -> Path:
        store.mkdir(parent)
        staging = parent / staging_name()
        store.mkdir(staging)
        store.mkdir(staging / SHARDS)
        return staging

    staging = communicator.run_on_rank_zero(stage)
    written = write_rank_files(store, staging, pending, communicator.rank)
    gathered = communicator.all_gather_object(written)

    def finish() -> Path:
        with removed_on_error(store, staging):
            sync_logs(store, run_dir, pending.logs)
        return _finish(store, staging, gathered)

    path: Path = communicator.run_on_rank_zero(finish)
    return path


def write_rank_files(
    store: Store, staging: Path, pending: PendingCheckpoint, rank: int
) -> RankFiles:
    """Write the shards of this rank, and on rank 0 everything else; an error is part of the result."""
    try:
        manifest = write_files(store, staging, _without_shards(pending)) if rank == 0 else None
        return replace(_write_shards(store, staging, pending, rank), manifest=manifest)
    except (LoopkitError, OSError) as error:
        return RankFiles(error=error)


def _without_shards(pending: PendingCheckpoint) -> PendingCheckpoint:
    whole = {
        prefix: {name: value for name, value in named.items() if not isinstance(value, Shard)}
        for prefix, named in pending.tensors.items()
    }
    return replace(pending, tensors={prefix: named for prefix, named in whole.items() if named})


def _write_shards(store: Store, staging: Path, pending: PendingCheckpoint, rank: int) -> RankFiles:
    written = RankFiles()
    for prefix, named in pending.tensors.items():
        shards = {name: value for name, value in named.items() if isinstance(value, Shard)}
        aliases = safetensors_io.find_aliases(shards)
        local: dict[str, torch.Tensor] = {
            name: shard.tensor
            for name, shard in shards.items()
            if shard.tensor is not None and name not in aliases
        }
        if aliases:
            written.aliases[prefix] = aliases
        if not local:
            continue
        path = f"{SHARDS}/{prefix}-{rank:05d}{TENSORS}"
        with store.create(staging / path, safetensors_io.data_size(local)) as file:
            specs = safetensors_io.write_tensors(file, local, {})
        written.files.append(FileRecord(path, file.size, file.digest))
        written.records[prefix] = {
            name: TensorRecord(
                spec.dtype,
                shards[name].shape,
                (Chunk(path, shards[name].offset, spec.shape, spec.digest),),
            )
            for name, spec in specs.items()
        }
    return written


def _finish(store: Store, staging: Path, gathered: list[RankFiles]) -> Path:
    """On rank 0: merge the ranks' files into one manifest, and publish the checkpoint."""
    with removed_on_error(store, staging):
        manifest = merged(gathered)
        store.sync_dir(staging / SHARDS)
        final, digest = publish(store, staging, manifest)
    point_latest(store, final, manifest, digest)
    return final


def merged(gathered: list[RankFiles]) -> Manifest:
    """Return the manifest of what all ranks wrote; raise the first error of any of them."""
    for written in gathered:
        if written.error is not None:
            raise written.error
    manifest, aliases = gathered[0].manifest, gathered[0].aliases
    assert manifest is not None
    for written in gathered:
        _merge(manifest, written)
    manifest.aliases = {
        prefix: {**manifest.aliases.get(prefix, {}), **aliases.get(prefix, {})}
        for prefix in manifest.aliases.keys() | aliases.keys()
    }
    return manifest


def _merge(manifest: Manifest, written: RankFiles) -> None:
    manifest.files.update({record.path: record for record in written.files})
    for prefix, records in written.records.items():
        tensors = manifest.tensors.setdefault(prefix, {})
        for name, record in records.items():
            before = tensors[name].chunks if name in tensors else ()
            tensors[name] = replace(record, chunks=(*before, *record.chunks))
