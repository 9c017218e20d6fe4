"""MANIFEST.json: the files and tensors of a checkpoint, with sizes and checksums."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loopkit.checkpoint import codecs, digests
from loopkit.checkpoint.format import (
    FORMAT,
    MANIFEST,
    MIN_READER,
    STATE,
    VERSION,
    dump_json,
    load_json,
    safe_name,
)
from loopkit.errors import CheckpointError, CorruptCheckpointError

RESERVED = frozenset(
    ("format", "version", "min_reader", "generation", "files", "tensors", "aliases", "checksum")
)
"""Names that a snapshot's ``meta`` cannot use. The writer sets ``generation``."""

MAX_CHUNKS = 65536
"""The most chunks that one tensor can have."""

_Box = list[tuple[int, int]]
Migration = Callable[[dict[str, Any]], dict[str, Any]]


def _from_version_1(raw: dict[str, Any]) -> dict[str, Any]:
    """Name the method of each checksum: SHA-256 of files, CRC-32 of the parts of tensors."""
    files = [{**f, "digest": f"sha256:{f['sha256']}"} for f in raw["files"]]
    tensors = {
        prefix: {
            name: {
                **record,
                "chunks": [
                    {**c, "digest": f"crc32:{_count(c['crc32']):08x}"} for c in record["chunks"]
                ],
            }
            for name, record in records.items()
        }
        for prefix, records in raw["tensors"].items()
    }
    return {**raw, "files": files, "tensors": tensors}


MIGRATIONS: dict[int, Migration] = {1: _from_version_1}
"""By version: a pure function of the manifest's JSON that brings it to the next version."""


@dataclass(frozen=True)
class FileRecord:
    """One file: its relative path, its size in bytes and its digest."""

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor in a file: its offset in the tensor, its shape, the digest of its bytes."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True)
class TensorRecord:
    """One tensor: its safetensors dtype code, its shape, and the chunks that tile it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass
class Manifest:
    """The parsed MANIFEST.json.

    Attributes:
        meta: the snapshot's facts.
        generation: 1 for the first checkpoint of a step.
        files: by relative path.
        tensors: by file prefix, then by tensor name.
        aliases: by file prefix: a tensor's name to the name of the tensor that it shares memory
            with.
    """

    meta: dict[str, Any]
    generation: int
    files: dict[str, FileRecord]
    tensors: dict[str, dict[str, TensorRecord]]
    aliases: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """The bytes of all files and of the manifest itself."""
        return sum(record.size for record in self.files.values()) + len(self.dump())

    def dump(self) -> bytes:
        """Return the content of MANIFEST.json. Raises what :func:`meta_json` raises."""
        body = {
            **meta_json(self.meta),
            "format": FORMAT,
            "version": VERSION,
            "min_reader": MIN_READER,
            "generation": self.generation,
            "files": [vars(record) for record in self.files.values()],
            "tensors": {
                prefix: {name: _tensor_json(record) for name, record in records.items()}
                for prefix, records in self.tensors.items()
            },
            "aliases": self.aliases,
        }
        return dump_json({**body, "checksum": checksum(body)})


def meta_json(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``meta`` as the manifest stores it.

    Raises:
        ValueError: a name is reserved, or ``step`` is missing.
        TypeError: a value has a type that cannot be saved.
    """
    own = {name: value for name, value in meta.items() if name != "generation"}
    if RESERVED.intersection(own) or any(
        type(name) is not str or name.startswith("$") for name in own
    ):
        raise ValueError(f"meta takes plain names, none of {sorted(RESERVED)}")
    step = own.get("step")
    if type(step) is not int or not 0 <= step < 10**18:
        raise ValueError(f"meta needs a step from 0, not {step!r}")
    encoded: dict[str, Any] = codecs.encode(own, "meta", _NoTensors())
    return encoded


class _NoTensors(dict[str, Any]):
    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(f"{name}: a tensor or an array cannot be in meta; put it in state")


def _tensor_json(record: TensorRecord) -> dict[str, Any]:
    return {
        "dtype": record.dtype,
        "shape": record.shape,
        "chunks": [vars(chunk) for chunk in record.chunks],
    }


def checksum(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the manifest without its ``checksum``, as it is written."""
    content = {key: body[key] for key in body if key != "checksum"}
    return hashlib.sha256(dump_json(content)).hexdigest()


def parse_manifest(
    data: bytes, what: str = MANIFEST, migrations: Mapping[int, Migration] = MIGRATIONS
) -> Manifest:
    """Parse a manifest, migrate it to this version and check that it is consistent.

    Args:
        data: the content of MANIFEST.json.
        what: its name in error messages.
        migrations: steps between versions, see :data:`MIGRATIONS`.

    Raises:
        CorruptCheckpointError: it is not what was written.
        CheckpointError: this version of loopkit cannot read it.
    """
    raw = load_json(data, what)
    if type(raw) is not dict or raw.get("format") != FORMAT:
        raise CorruptCheckpointError(f"{what}: not a {FORMAT} manifest")
    # Compared byte for byte, so that no edit passes, not even one of spaces.
    if raw.get("checksum") != checksum(raw) or dump_json(raw) != data:
        raise CorruptCheckpointError(f"{what}: edited or damaged, its checksum does not match")
    try:
        return _build(migrate(raw, what, migrations))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpointError(f"{what}: {type(error).__name__}: {error}") from None


def migrate(raw: dict[str, Any], what: str, migrations: Mapping[int, Migration]) -> dict[str, Any]:
    """Bring the manifest's JSON to this version.

    Raises:
        CheckpointError: a newer loopkit is needed, or the version is no longer supported.
    """
    version, needed = _count(raw["version"]), _count(raw["min_reader"])
    if needed > VERSION:
        raise CheckpointError(
            f"{what}: written in format version {version}, which needs a reader of version "
            f"{needed}; this loopkit reads version {VERSION}. Install a newer loopkit."
        )
    while version < VERSION:
        if version not in migrations:
            raise CheckpointError(f"{what}: format version {version} is no longer supported")
        raw = migrations[version](raw)
        version += 1
    return raw


def _build(raw: dict[str, Any]) -> Manifest:
    files = [
        FileRecord(str(f["path"]), _count(f["size"]), _digest(f["digest"])) for f in raw["files"]
    ]
    tensors = {
        prefix: {name: _tensor(record) for name, record in records.items()}
        for prefix, records in raw["tensors"].items()
    }
    try:
        meta = codecs.decode({key: raw[key] for key in raw if key not in RESERVED}, "meta", {})
    except CorruptCheckpointError as error:
        raise ValueError(error) from None
    meta["generation"] = _count(raw["generation"])
    found = Manifest(meta, meta["generation"], {f.path: f for f in files}, tensors, raw["aliases"])
    _count(meta["step"])
    if len(found.files) != len(files) or not all(
        safe_name(f.path) and f.path != MANIFEST for f in files
    ):
        raise ValueError("file names that are unsafe or appear twice")
    if STATE not in found.files:
        raise ValueError(f"{STATE} is not listed")
    check_coverage(found)
    return found


def _digest(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{str(value)[:60]!a} is not a digest")
    try:
        digests.like(value)
    except CorruptCheckpointError as error:
        raise ValueError(error) from None
    return value


def _tensor(raw: dict[str, Any]) -> TensorRecord:
    chunks = tuple(
        Chunk(str(c["file"]), _shape(c["offset"]), _shape(c["shape"]), _digest(c["digest"]))
        for c in raw["chunks"]
    )
    return TensorRecord(str(raw["dtype"]), _shape(raw["shape"]), chunks)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{str(value)[:60]!a} is not a count")
    return value


def _shape(value: Any) -> tuple[int, ...]:
    if type(value) is not list or len(value) > 64:
        raise ValueError(f"{str(value)[:60]!a} is not a shape")
    return tuple(_count(size) for size in value)


def check_coverage(manifest: Manifest) -> None:
    """Check that the chunks tile every tensor, in files that are listed, and that aliases exist.

    Raises:
        ValueError: with the name of the first tensor that is wrong.
    """
    seen: set[tuple[str, str]] = set()
    for prefix, records in manifest.tensors.items():
        for name, record in records.items():
            keys = {(chunk.file, name) for chunk in record.chunks}
            if len(keys) != len(record.chunks) or keys & seen:
                raise ValueError(f"{prefix} tensor {name!r} appears twice in a file")
            seen |= keys
            if not _tiles(record):
                raise ValueError(
                    f"the chunks of {prefix} tensor {name!r} do not cover it exactly once"
                )
            if any(chunk.file not in manifest.files for chunk in record.chunks):
                raise ValueError(f"{prefix} tensor {name!r} is in a file that is not listed")
    for prefix, names in manifest.aliases.items():
        known = manifest.tensors.get(prefix, {})
        for name, canonical in names.items():
            if canonical not in known or name in known:
                raise ValueError(
                    f"{prefix} tensor {name!r} shares memory with {canonical!r}, which is missing"
                )


def _tiles(record: TensorRecord) -> bool:
    boxes: list[_Box] = []
    for chunk in record.chunks:
        if len(chunk.offset) != len(record.shape) or len(chunk.shape) != len(record.shape):
            return False
        box = [(start, start + size) for start, size in zip(chunk.offset, chunk.shape)]
        if any(stop > size for (_, stop), size in zip(box, record.shape)):
            return False
        boxes.append(box)
    volume = sum(math.prod(chunk.shape) for chunk in record.chunks)
    if not 0 < len(boxes) <= MAX_CHUNKS or volume != math.prod(record.shape):
        return False
    # Boxes inside the bounds, of the same total volume and without overlap, tile the tensor.
    return volume == 0 or len(boxes) == 1 or not _overlapping(boxes)


def _overlapping(boxes: list[_Box]) -> bool:
    open_boxes: list[_Box] = []
    for box in sorted(boxes):
        # The boxes are sorted by the first dimension: one that ends before this one starts
        # overlaps no later one.
        open_boxes = [other for other in open_boxes if other[0][1] > box[0][0]]
        if any(
            all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(box, other)) for other in open_boxes
        ):
            return True
        open_boxes.append(box)
    return False
