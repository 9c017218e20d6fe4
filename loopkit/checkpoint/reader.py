"""Reading one checkpoint: everything is checked before anything is returned."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from loopkit.checkpoint import codecs, safetensors_io
from loopkit.checkpoint.format import (
    MANIFEST,
    MAX_EXTRA,
    MAX_JSON,
    STATE,
    ShardedTensor,
    Snapshot,
    load_json,
    parse_name,
    step_name,
)
from loopkit.checkpoint.manifest import Chunk, FileRecord, Manifest, TensorRecord, parse
from loopkit.checkpoint.store import Store
from loopkit.errors import CheckpointError, CorruptCheckpointError

_LARGE = ("model", "optimizer")


def read_manifest(store: Store, directory: Path) -> Manifest:
    """The manifest of a checkpoint, checked in itself and against the directory's name.

    ``CorruptCheckpointError`` when it is damaged or missing, ``CheckpointError`` when it is too
    new.
    """
    path = directory / MANIFEST
    try:
        manifest = parse(store.read_bytes(directory, MANIFEST, MAX_JSON), str(path))
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{path} is missing") from None
    name = step_name(manifest.meta["step"], manifest.generation)
    if parse_name(directory.name) and directory.name != name:
        raise CorruptCheckpointError(f"{path} is that of {name}")
    return manifest


def read(store: Store, directory: Path, verify: bool = True) -> Snapshot:
    """The checkpoint in ``directory``, all in fresh CPU memory.

    ``CorruptCheckpointError`` naming file and tensor when anything differs from what was written,
    ``CheckpointError`` for one that is too new or cannot be read, ``FileNotFoundError`` when there
    is no such directory. ``verify=False`` skips the SHA-256 of whole files; sizes, headers and the
    CRC-32 of each tensor are checked all the same.
    """
    if not store.is_dir(directory, follow=True):
        raise FileNotFoundError(f"{directory} is not a directory")
    manifest = read_manifest(store, directory)
    found = Snapshot({prefix: {} for prefix in manifest.tensors}, {}, manifest.meta)
    placed = _placed(manifest)
    if not store.maps:
        _check_memory(directory, manifest)
    for record in manifest.files.values():
        _read_file(store, directory, record, placed.get(record.path), found, verify)
    for prefix, names in manifest.aliases.items():
        found.tensors[prefix].update(
            {name: found.tensors[prefix][first] for name, first in names.items()}
        )
    data = load_json(found.files.pop(STATE), str(directory / STATE))
    try:
        found.state = codecs.decode(data, "", found.tensors.get("state", {}))
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{directory / STATE}: {error}") from None
    if not found.tensors.get("state", True):
        del found.tensors["state"]
    if type(found.state) is not dict:
        raise CorruptCheckpointError(f"{directory / STATE}: not an object")
    return found


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


def verify(store: Store, directory: Path) -> list[str]:
    """Everything that is wrong with a checkpoint, one line for each file; empty when it is good.

    Reads every byte but keeps none. ``CheckpointError`` for one that is too new or cannot be read.
    """
    try:
        manifest = read_manifest(store, directory)
    except CorruptCheckpointError as error:
        return [str(error)]
    problems = []
    placed = _placed(manifest)
    for record in manifest.files.values():
        try:
            _read_file(store, directory, record, placed.get(record.path), None, True)
        except CorruptCheckpointError as error:
            problems.append(str(error))
    return problems


def check_sizes(store: Store, directory: Path, manifest: Manifest) -> None:
    """``CorruptCheckpointError`` when a file is missing or has another size; reads no data."""
    for record in manifest.files.values():
        try:
            with store.open(directory, record.path) as source:
                _check_size(source.path, source.size, record)
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{directory / record.path} is missing") from None


@dataclass(frozen=True)
class _Place:
    prefix: str
    record: TensorRecord
    chunk: Chunk


def _placed(manifest: Manifest) -> dict[str, dict[str, _Place]]:
    """File to name in the file to where its bytes belong."""
    found: dict[str, dict[str, _Place]] = {}
    for prefix, records in manifest.tensors.items():
        for name, record in records.items():
            for chunk in record.chunks:
                found.setdefault(chunk.file, {})[name] = _Place(prefix, record, chunk)
    return found


def _check_size(path: Path, size: int, record: FileRecord) -> None:
    if size != record.size:
        raise CorruptCheckpointError(f"{path}: {size} bytes, {record.size} were written")


def _read_file(
    store: Store,
    directory: Path,
    record: FileRecord,
    places: dict[str, _Place] | None,
    into: Snapshot | None,
    verify: bool,
) -> None:
    try:
        with store.open(directory, record.path, hashed=verify) as source:
            _check_size(source.path, source.size, record)
            if places is not None:
                specs = {
                    name: safetensors_io.Spec(
                        place.record.dtype, place.chunk.shape, place.chunk.crc32
                    )
                    for name, place in places.items()
                }
                maps = store.maps and all(place.prefix in _LARGE for place in places.values())
                tensors = safetensors_io.read(source, specs, keep=into is not None, maps=maps)
            else:
                limit = MAX_JSON if record.path == STATE else MAX_EXTRA
                if source.size > limit:
                    raise CorruptCheckpointError(
                        f"{source.path}: {source.size} bytes, more than {limit}"
                    )
                data = source.read_all(keep=into is not None)
            if verify and source.sha256 != record.sha256:
                raise CorruptCheckpointError(
                    f"{source.path}: its bytes are not those written (SHA-256)"
                )
    except FileNotFoundError:
        raise CorruptCheckpointError(f"{directory / record.path} is missing") from None
    if into is None:
        return
    if places is None:
        into.files[record.path] = data
        return
    for name, tensor in tensors.items():
        place = places[name]
        named = into.tensors[place.prefix]
        if place.chunk.shape == place.record.shape:
            named[name] = tensor
            continue
        if maps:
            pieces = named.setdefault(name, ShardedTensor(place.record.shape, tensor.dtype, []))
            pieces.pieces.append((place.chunk.offset, tensor))
            continue
        whole = named.setdefault(name, torch.empty(place.record.shape, dtype=tensor.dtype))
        box = tuple(slice(at, at + size) for at, size in zip(place.chunk.offset, place.chunk.shape))
        whole[box] = tensor
