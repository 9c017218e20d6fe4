"""Writing one checkpoint from several ranks: each its own parts, and whole only when all of them
are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from loopkit.checkpoint import safetensors_io
from loopkit.checkpoint.format import TENSORS, Shard, Snapshot, checkpoints_dir
from loopkit.checkpoint.manifest import Chunk, FileRecord, Manifest, TensorRecord
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.writer import (
    PendingCheckpoint,
    draft,
    point_latest,
    publish,
    removed_on_error,
    staging_name,
    write_files,
)
from loopkit.errors import LoopkitError

SHARDS = "shards"


class Everyone(Protocol):
    """What writing together asks of the ranks; ``loopkit.distributed.communicator.World`` has it."""

    rank: int

    def all_gather_object(self, value: Any) -> list[Any]:
        """Everyone's value."""

    def run_on_rank_zero(self, function: Callable[[], Any]) -> Any:
        """What the function gives, or raises, on the first rank."""


@dataclass
class Written:
    """What one rank wrote of the parts: its files, and the chunks in them by prefix and tensor."""

    files: list[FileRecord]
    records: dict[str, dict[str, TensorRecord]]
    aliases: dict[str, dict[str, str]]


def write_together(
    store: Store, run_dir: Path, snapshot: Snapshot | PendingCheckpoint, ranks: Everyone
) -> Path:
    """As ``write``, called by all ranks: parts are written by their ranks, everything else by the
    first.

    Whatever goes wrong on any rank, the staging directory is removed and all ranks raise the same
    error.
    """
    ready = snapshot if isinstance(snapshot, PendingCheckpoint) else draft(snapshot)
    parent = checkpoints_dir(run_dir)

    def stage() -> Path:
        if store.mkdir(parent):
            store.sync_dir(parent.parent)
        staging = parent / staging_name()
        store.mkdir(staging)
        store.mkdir(staging / SHARDS)
        return staging

    staging = ranks.run_on_rank_zero(stage)
    mine: tuple[Any, ...] = (None, None, None)
    try:
        manifest = write_files(store, staging, _without_parts(ready)) if ranks.rank == 0 else None
        mine = (_write_parts(store, staging, ready, ranks.rank), manifest, None)
    except (LoopkitError, OSError) as error:
        mine = (None, None, error)
    gathered = ranks.all_gather_object(mine)
    path: Path = ranks.run_on_rank_zero(lambda: _finish(store, staging, gathered))
    return path


def _without_parts(ready: PendingCheckpoint) -> PendingCheckpoint:
    plain = {
        prefix: {n: t for n, t in named.items() if not isinstance(t, Shard)}
        for prefix, named in ready.tensors.items()
    }
    return replace(ready, tensors={prefix: named for prefix, named in plain.items() if named})


def _write_parts(store: Store, staging: Path, ready: PendingCheckpoint, rank: int) -> Written:
    written = Written([], {}, {})
    for prefix, named in ready.tensors.items():
        parts = {name: held for name, held in named.items() if isinstance(held, Shard)}
        aliases = safetensors_io.find_aliases(parts)
        own: dict[str, torch.Tensor] = {
            name: part.tensor
            for name, part in parts.items()
            if part.tensor is not None and name not in aliases
        }
        if aliases:
            written.aliases[prefix] = aliases
        if not own:
            continue
        name = f"{SHARDS}/{prefix}-{rank:05d}{TENSORS}"
        with store.create(staging / name, safetensors_io.data_size(own)) as sink:
            specs = safetensors_io.write(sink, own, {})
        written.files.append(FileRecord(name, sink.size, sink.sha256))
        written.records[prefix] = {
            key: TensorRecord(
                s.dtype, parts[key].shape, (Chunk(name, parts[key].offset, s.shape, s.crc32),)
            )
            for key, s in specs.items()
        }
    return written


def _finish(store: Store, staging: Path, gathered: list[tuple[Any, ...]]) -> Path:
    """On the first rank: one manifest of what all wrote, and the checkpoint its name."""
    with removed_on_error(store, staging):
        for _, _, failure in gathered:
            if failure is not None:
                raise failure
        manifest: Manifest = gathered[0][1]
        for written, _, _ in gathered:
            _merge(manifest, written)
        manifest.aliases = {
            prefix: {**manifest.aliases.get(prefix, {}), **gathered[0][0].aliases.get(prefix, {})}
            for prefix in manifest.aliases.keys() | gathered[0][0].aliases.keys()
        }
        store.sync_dir(staging / SHARDS)
        final, digest = publish(store, staging, manifest)
    point_latest(store, final, manifest, digest)
    return final


def _merge(manifest: Manifest, written: Written) -> None:
    manifest.files.update({record.path: record for record in written.files})
    for prefix, records in written.records.items():
        held = manifest.tensors.setdefault(prefix, {})
        for name, record in records.items():
            before = held[name].chunks if name in held else ()
            held[name] = replace(record, chunks=(*before, *record.chunks))
