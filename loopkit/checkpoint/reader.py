"""Reading one checkpoint: everything is checked before anything is returned."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from loopkit.checkpoint import codecs, safetensors_io
from loopkit.checkpoint.digests import like
from loopkit.checkpoint.format import (
    MANIFEST,
    MAX_EXTRA,
    MAX_JSON,
    SHARDS,
    STATE,
    load_json,
    parse_name,
    step_name,
)
from loopkit.checkpoint.manifest import (
    Chunk,
    FileRecord,
    Manifest,
    TensorRecord,
    parse_manifest,
)
from loopkit.checkpoint.snapshot import ShardedTensor, Snapshot
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.streams import FileReader
from loopkit.errors import CheckpointError, CorruptCheckpointError

logger = logging.getLogger(__name__)

_MAPPED = ("model", "optimizer")


def read_manifest(store: Store, directory: Path) -> Manifest:
    """Return a checkpoint's manifest, checked in itself and against the directory's name.

    Raises:
        CorruptCheckpointError: it is damaged or missing.
        CheckpointError: a newer loopkit wrote it.
    """
    path = directory / MANIFEST
    try:
        manifest = parse_manifest(store.read_bytes(directory, MANIFEST, MAX_JSON), str(path))
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None
    name = step_name(manifest.meta["step"], manifest.generation)
    if parse_name(directory.name) and directory.name != name:
        raise CorruptCheckpointError(f"{path} is that of {name}")
    return manifest


def read_checkpoint(store: Store, directory: Path, verify: bool = True) -> Snapshot:
    """Read the checkpoint in ``directory`` into fresh CPU memory.

    Args:
        store: with ``maps``, tensors of the model and the optimizer are memory mapped instead.
        directory: of the checkpoint.
        verify: compute the digests of whole files. Sizes, headers and the digest of each tensor
            are checked in any case.

    Raises:
        CorruptCheckpointError: anything differs from what was written; names file and tensor.
        CheckpointError: it cannot be read, or a newer loopkit wrote it.
        FileNotFoundError: there is no such directory.
    """
    if not store.is_dir(directory, follow=True):
        raise FileNotFoundError(f"{directory} is not a directory")
    manifest = read_manifest(store, directory)
    snapshot = Snapshot({prefix: {} for prefix in manifest.tensors}, {}, manifest.meta)
    located = _chunks_by_file(manifest)
    if not store.maps:
        _check_memory(directory, manifest)
    for record in manifest.files.values():
        chunks = located.get(record.path)
        _read_file(store, directory, record, chunks, into=snapshot, verify=verify)
    for prefix, names in manifest.aliases.items():
        tensors = snapshot.tensors[prefix]
        tensors.update({name: tensors[first] for name, first in names.items()})
    data = load_json(snapshot.files.pop(STATE), str(directory / STATE))
    try:
        snapshot.state = codecs.decode(data, "", snapshot.tensors.get("state", {}))
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{directory / STATE}: {error}") from None
    if not snapshot.tensors.get("state", True):
        del snapshot.tensors["state"]
    if type(snapshot.state) is not dict:
        raise CorruptCheckpointError(f"{directory / STATE}: not an object")
    logger.info("read checkpoint %s", directory)
    return snapshot


def _check_memory(directory: Path, manifest: Manifest) -> None:
    """Refuse a checkpoint that is larger than the memory of this machine.

    Some systems grant memory that they do not have, and end the process later.
    """
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return
    needed = sum(record.size for record in manifest.files.values())
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        raise CheckpointError(
            f"{directory} needs {needed} bytes of memory, and this machine has {available}"
        )


def verify_checkpoint(store: Store, directory: Path) -> list[str]:
    """Read every byte of a checkpoint and return what is wrong, one line per file; [] if valid.

    Raises:
        CheckpointError: it cannot be read, or a newer loopkit wrote it.
    """
    try:
        manifest = read_manifest(store, directory)
    except CorruptCheckpointError as error:
        return [str(error)]
    found = _verify_files(store, directory, manifest)
    return [
        problem
        for path, problem in found.items()
        if problem and not _is_elsewhere(store, directory, path)
    ]


def valid_files(store: Store, directory: Path, manifest: Manifest) -> list[str]:
    """Return the paths of the files of a checkpoint that are here with every byte as written.

    Raises:
        CheckpointError: a file cannot be read.
    """
    found = _verify_files(store, directory, manifest)
    return [path for path, problem in found.items() if not problem]


def _verify_files(store: Store, directory: Path, manifest: Manifest) -> dict[str, str]:
    """Read every file; return what is wrong with each, "" if nothing is."""
    problems = {}
    located = _chunks_by_file(manifest)
    for path, record in manifest.files.items():
        problems[path] = ""
        try:
            _read_file(store, directory, record, located.get(path), into=None, verify=True)
        except CorruptCheckpointError as error:
            problems[path] = str(error)
    return problems


def _is_elsewhere(store: Store, directory: Path, name: str) -> bool:
    """Return whether a file is a shard that another machine keeps on a disk of its own."""
    path = directory / name
    return (
        store.partial
        and name.startswith(f"{SHARDS}/")
        and path.name not in store.names(path.parent)
    )


def check_sizes(store: Store, directory: Path, manifest: Manifest) -> None:
    """Check that every file exists and has its size; reads no data.

    Raises:
        CorruptCheckpointError: naming the first file that does not.
    """
    for record in manifest.files.values():
        try:
            with store.open(directory, record.path) as file:
                _check_size(file, record)
        except FileNotFoundError:
            if _is_elsewhere(store, directory, record.path):
                continue
            raise CorruptCheckpointError(f"{directory / record.path} is missing") from None


@dataclass(frozen=True)
class _Location:
    """The part of a tensor that a file holds under the tensor's name."""

    prefix: str
    record: TensorRecord
    chunk: Chunk

    def spec(self) -> safetensors_io.TensorSpec:
        """Return what the manifest records of the part."""
        return safetensors_io.TensorSpec(self.record.dtype, self.chunk.shape, self.chunk.digest)


def _chunks_by_file(manifest: Manifest) -> dict[str, dict[str, _Location]]:
    """Return, by file and by name in the file, which part of which tensor it is."""
    found: dict[str, dict[str, _Location]] = {}
    for prefix, records in manifest.tensors.items():
        for name, record in records.items():
            for chunk in record.chunks:
                found.setdefault(chunk.file, {})[name] = _Location(prefix, record, chunk)
    return found


def _check_size(file: FileReader, record: FileRecord) -> None:
    if file.size != record.size:
        raise CorruptCheckpointError(f"{file.path}: {file.size} bytes, {record.size} were written")


def _read_file(
    store: Store,
    directory: Path,
    record: FileRecord,
    chunks: dict[str, _Location] | None,
    *,
    into: Snapshot | None,
    verify: bool,
) -> None:
    """Check one file, and put its content into a snapshot if one is given.

    Args:
        chunks: the tensors in the file; None for a file of another kind.
    """
    keep = into is not None
    maps = store.maps and all(part.prefix in _MAPPED for part in (chunks or {}).values())
    digest = like(record.digest) if verify else None
    try:
        with store.open(directory, record.path, digest) as file:
            _check_size(file, record)
            if chunks is not None:
                specs = {name: part.spec() for name, part in chunks.items()}
                tensors = safetensors_io.read_tensors(file, specs, keep=keep, maps=maps)
            else:
                limit = MAX_JSON if record.path == STATE else MAX_EXTRA
                if file.size > limit:
                    raise CorruptCheckpointError(
                        f"{file.path}: {file.size} bytes, more than {limit}"
                    )
                data = file.read_all(keep=keep)
            if digest is not None and digest.text != record.digest:
                raise CorruptCheckpointError(
                    f"{file.path}: its bytes are not those written (checksum)"
                )
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{directory / record.path} is missing") from None
    if into is None:
        return
    if chunks is None:
        into.files[record.path] = data
        return
    for name, tensor in tensors.items():
        _store_part(into, name, chunks[name], tensor, maps=maps)


def _store_part(
    into: Snapshot, name: str, part: _Location, tensor: torch.Tensor, *, maps: bool
) -> None:
    """Put a tensor into a snapshot, or a piece of one to the pieces that are there already."""
    named = into.tensors[part.prefix]
    shape, offset = part.record.shape, part.chunk.offset
    if part.chunk.shape == shape:
        named[name] = tensor
    elif maps:
        sharded = named.setdefault(name, ShardedTensor(shape, tensor.dtype, []))
        sharded.pieces.append((offset, tensor))
    else:
        whole = named.setdefault(name, torch.empty(shape, dtype=tensor.dtype))
        whole[tuple(slice(at, at + size) for at, size in zip(offset, tensor.shape))] = tensor
