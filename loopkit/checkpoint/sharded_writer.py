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
from loopkit.checkpoint.format import TENSORS, Part, Snapshot, checkpoints_dir
from loopkit.checkpoint.manifest import Chunk, FileRecord, Manifest, TensorRecord
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.writer import (
    Draft,
    draft,
    gone_on_failure,
    point_latest,
    publish,
    staging_name,
    write_files,
)
from loopkit.errors import LoopkitError

SHARDS = "shards"


class Everyone(Protocol):
    """What writing together asks of the ranks; ``loopkit.distributed.communicator.World`` has it."""

    rank: int

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value."""

    def first(self, function: Callable[[], Any]) -> Any:
        """What the function gives, or raises, on the first rank."""


@dataclass
class Written:
    """What one rank wrote of the parts: its files, and the chunks in them by stem and tensor."""

    files: list[FileRecord]
    records: dict[str, dict[str, TensorRecord]]
    aliases: dict[str, dict[str, str]]


def write_together(
    store: Store, run_dir: Path, snapshot: Snapshot | Draft, ranks: Everyone
) -> Path:
    """As ``write``, called by all ranks: parts are written by their ranks, everything else by the
    first.

    Whatever goes wrong on any rank, the staging directory is removed and all ranks raise the same
    error.
    """
    ready = snapshot if isinstance(snapshot, Draft) else draft(snapshot)
    parent = checkpoints_dir(run_dir)

    def stage() -> Path:
        if store.mkdir(parent):
            store.sync_dir(parent.parent)
        staging = parent / staging_name()
        store.mkdir(staging)
        store.mkdir(staging / SHARDS)
        return staging

    staging = ranks.first(stage)
    mine: tuple[Any, ...] = (None, None, None)
    try:
        manifest = write_files(store, staging, _without_parts(ready)) if ranks.rank == 0 else None
        mine = (_write_parts(store, staging, ready, ranks.rank), manifest, None)
    except (LoopkitError, OSError) as error:
        mine = (None, None, error)
    everyones = ranks.gather(mine)
    path: Path = ranks.first(lambda: _finish(store, staging, everyones))
    return path


def _without_parts(ready: Draft) -> Draft:
    plain = {
        stem: {n: t for n, t in named.items() if not isinstance(t, Part)}
        for stem, named in ready.tensors.items()
    }
    return replace(ready, tensors={stem: named for stem, named in plain.items() if named})


def _write_parts(store: Store, staging: Path, ready: Draft, rank: int) -> Written:
    written = Written([], {}, {})
    for stem, named in ready.tensors.items():
        parts = {name: held for name, held in named.items() if isinstance(held, Part)}
        aliases = safetensors_io.find_aliases(parts)
        own: dict[str, torch.Tensor] = {
            name: part.tensor
            for name, part in parts.items()
            if part.tensor is not None and name not in aliases
        }
        if aliases:
            written.aliases[stem] = aliases
        if not own:
            continue
        name = f"{SHARDS}/{stem}-{rank:05d}{TENSORS}"
        with store.create(staging / name, safetensors_io.data_size(own)) as sink:
            specs = safetensors_io.write(sink, own, {})
        written.files.append(FileRecord(name, sink.size, sink.sha256))
        written.records[stem] = {
            key: TensorRecord(
                s.dtype, parts[key].shape, (Chunk(name, parts[key].offset, s.shape, s.crc32),)
            )
            for key, s in specs.items()
        }
    return written


def _finish(store: Store, staging: Path, everyones: list[tuple[Any, ...]]) -> Path:
    """On the first rank: one manifest of what all wrote, and the checkpoint its name."""
    with gone_on_failure(store, staging):
        for _, _, failure in everyones:
            if failure is not None:
                raise failure
        manifest: Manifest = everyones[0][1]
        for written, _, _ in everyones:
            _merge(manifest, written)
        manifest.aliases = {
            stem: {**manifest.aliases.get(stem, {}), **everyones[0][0].aliases.get(stem, {})}
            for stem in manifest.aliases.keys() | everyones[0][0].aliases.keys()
        }
        store.sync_dir(staging / SHARDS)
        final, digest = publish(store, staging, manifest)
    point_latest(store, final, manifest, digest)
    return final


def _merge(manifest: Manifest, written: Written) -> None:
    manifest.files.update({record.path: record for record in written.files})
    for stem, records in written.records.items():
        held = manifest.tensors.setdefault(stem, {})
        for name, record in records.items():
            before = held[name].chunks if name in held else ()
            held[name] = replace(record, chunks=(*before, *record.chunks))
