"""Checkpoints on disks that machines do not share: each machine keeps rank 0's files and its own shards.

All machines hold the same manifest, so it says of any file on any of them which checkpoint it
belongs to. A resume copies what a machine lacks from one that has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from loopkit.checkpoint.digests import like, of
from loopkit.checkpoint.format import (
    MANIFEST,
    MAX_JSON,
    SHARDS,
    aside_name,
    checkpoints_dir,
    parse_name,
)
from loopkit.checkpoint.manifest import FileRecord, Manifest, parse_manifest
from loopkit.checkpoint.reader import read_manifest, valid_files
from loopkit.checkpoint.sharded_writer import merged, write_rank_files
from loopkit.checkpoint.snapshot import Snapshot
from loopkit.checkpoint.staging import staging_name
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.streams import CHUNK, FileReader, FileWriter
from loopkit.checkpoint.writer import (
    PendingCheckpoint,
    next_generation,
    point_latest,
    prepare,
    publish,
    sync_logs,
)
from loopkit.errors import CheckpointError, LoopkitError, LoopkitWarning, NoValidCheckpointError

if TYPE_CHECKING:
    from loopkit.distributed.communicator import Communicator

T = TypeVar("T")


@dataclass(frozen=True)
class NodeDisks:
    """The machines of a run, each with a run directory of its own, at the same path.

    All methods are collective.

    Attributes:
        communicator: of all ranks.
        leads: whether this rank handles the files that its machine holds once. Rank 0 does.
    """

    communicator: Communicator
    leads: bool

    def on_each(self, function: Callable[[], T]) -> T:
        """Call ``function`` on one rank of each machine; return what rank 0's call returned.

        If it raises on any machine, every rank raises the first error.
        """
        return self.communicator.run_on_all_ranks(
            lambda: function() if self.leads else None  # type: ignore[return-value]
        )

    def copy(
        self, store: Store, record: FileRecord, source: int, directory: Path, target: Path | None
    ) -> None:
        """Copy a file of rank ``source`` to the machines that lack it.

        Args:
            store: does the file operations.
            record: path below a checkpoint's directory, size and digest of the file.
            source: the rank that reads it.
            directory: the checkpoint there.
            target: the directory that this rank writes it to; None writes nothing.

        Raises:
            LoopkitError: it could not be read or written, or is not what was written.
        """
        failures: list[Exception] = []
        files = ExitStack()

        def tried(function: Callable[..., T], *arguments: Any) -> T | None:
            # After a failure this rank takes part to the end, since the others wait for it.
            try:
                return None if failures else function(*arguments)
            except (LoopkitError, OSError) as error:
                failures.append(error)
                return None

        reader = writer = None
        if self.communicator.rank == source:
            reader = tried(lambda: files.enter_context(store.open(directory, record.path)))
        if target is not None:
            writer = tried(lambda: files.enter_context(_created(store, target, record)))
        digest = like(record.digest)
        for start in range(0, record.size, CHUNK):
            size = min(CHUNK, record.size - start)
            piece = tried(_read, reader, size) if reader is not None else None
            piece = self.communicator.broadcast_object(piece or b"", source)
            if writer is not None:
                tried(writer.write, piece)
                digest.update(memoryview(piece))
        tried(files.close)
        files.close()
        if writer is not None and not failures and digest.text != record.digest:
            failures.append(CheckpointError(f"{writer.path} is not what was written (checksum)"))
        self.communicator.run_on_all_ranks(lambda: _raise_first(failures))


def write_on_nodes(
    store: Store, run_dir: Path, snapshot: Snapshot | PendingCheckpoint, disks: NodeDisks
) -> Path:
    """Save one checkpoint from all ranks on the disk of each machine, and return its directory.

    A machine gets the files of rank 0, and the shards of its own ranks. Every rank calls this. If
    anything fails on any machine, all ranks raise the same error.
    """
    pending = snapshot if isinstance(snapshot, PendingCheckpoint) else prepare(snapshot)
    communicator, parent = disks.communicator, checkpoints_dir(run_dir)
    staging = parent / communicator.broadcast_object(staging_name())
    try:
        disks.on_each(lambda: _make(store, staging))
        gathered = communicator.all_gather_object(
            write_rank_files(store, staging, pending, communicator.rank)
        )
        manifest = merged(gathered)
        assert gathered[0].manifest is not None
        for record in list(gathered[0].manifest.files.values()):
            if not record.path.startswith(f"{SHARDS}/"):
                wanted = disks.leads and communicator.rank != 0
                disks.copy(store, record, 0, staging, staging if wanted else None)
        found = next_generation(store, parent, manifest) if disks.leads else 1
        generation = max(communicator.all_gather_object(found))
        communicator.run_on_rank_zero(lambda: sync_logs(store, run_dir, pending.logs))
        return disks.on_each(lambda: _publish(store, staging, manifest, generation))
    except BaseException:
        if disks.leads:
            with suppress(LoopkitError, OSError):
                store.remove_tree(staging)
        raise


def find_on_nodes(store: Store, run_dir: Path, disks: NodeDisks) -> Path | None:
    """Find the newest checkpoint that the machines hold together; complete it on each of them.

    Every byte that counts is verified. A damaged file is replaced from another machine.

    Returns:
        The checkpoint; None if no machine holds any.

    Raises:
        NoValidCheckpointError: there are checkpoints, and none is whole.
    """
    parent, communicator = checkpoints_dir(run_dir), disks.communicator
    own = [name for name in store.names(parent) if parse_name(name)] if disks.leads else []
    names = {name for each in communicator.all_gather_object(own) for name in each}
    missing: list[str] = []
    for name in sorted(names, key=lambda name: parse_name(name) or (0, 0), reverse=True):
        problem = complete_on_nodes(store, parent / name, disks, kind="full")
        if problem:
            missing.append(f"{name}: {problem}")
            continue
        if problem is None:
            continue
        if missing and communicator.rank == 0:
            warnings.warn(
                f"not whole on the machines that are here: {'; '.join(missing)}. {name} is used",
                LoopkitWarning,
                stacklevel=2,
            )
        return parent / name
    if missing:
        raise NoValidCheckpointError(
            f"no checkpoint in {parent} is whole on the machines that are here: "
            f"{'; '.join(missing)}. Start the machines that hold the rest too"
        )
    return None


def complete_on_nodes(
    store: Store, directory: Path, disks: NodeDisks, kind: str | None = None
) -> str | None:
    """Give every machine the whole checkpoint in ``directory``, as far as any machine has it.

    Args:
        store: does the file operations.
        directory: the checkpoint.
        disks: the machines.
        kind: "full" or "weights": leave others alone.

    Returns:
        What is nowhere, as a text; "" if all is there now, None for a checkpoint of another kind.
    """
    offers = disks.communicator.all_gather_object(
        _offer(store, directory, kind) if disks.leads else Offer()
    )
    for offer in offers:
        if offer.digest and not _absent(offers, offer):
            _complete(store, directory, disks, offers, offer.digest)
            return ""
    lacking = [sorted(_absent(offers, offer)) for offer in offers if offer.digest]
    if lacking:
        return f"{lacking[0][0]} is nowhere valid"
    return None if any(offer.other_kind for offer in offers) else "no manifest can be read"


@dataclass(frozen=True)
class Offer:
    """What one machine holds of a checkpoint.

    Attributes:
        digest: the checksum of the manifest; "" if there is none that can be used.
        files: the paths of files whose every byte is as written.
        manifest: the content of MANIFEST.json.
        other_kind: whether the checkpoint is of a kind that was not asked for.
    """

    digest: str = ""
    files: frozenset[str] = frozenset()
    manifest: bytes = b""
    other_kind: bool = False


def _offer(store: Store, directory: Path, kind: str | None) -> Offer:
    try:
        manifest = read_manifest(store, directory)
        if kind is not None and manifest.meta.get("kind", "full") != kind:
            return Offer(other_kind=True)
        data = store.read_bytes(directory, MANIFEST, MAX_JSON)
        files = valid_files(store, directory, manifest)
    except (CheckpointError, FileNotFoundError):
        return Offer()
    return Offer(of(data), frozenset(files), data)


def _absent(offers: list[Offer], offer: Offer) -> set[str]:
    """Return the files of a manifest that no machine with the same manifest holds."""
    held = {path for each in offers if each.digest == offer.digest for path in each.files}
    return set(parse_manifest(offer.manifest, MANIFEST).files) - held


def _complete(
    store: Store, directory: Path, disks: NodeDisks, offers: list[Offer], digest: str
) -> None:
    """Give each machine the whole checkpoint of manifest ``digest``."""
    rank = disks.communicator.rank
    own = offers[rank]
    leaders = disks.communicator.all_gather_object(disks.leads)
    chosen = next(offer for offer in offers if offer.digest == digest)
    manifest = parse_manifest(chosen.manifest, MANIFEST)
    # A machine without the checkpoint gets it under its name when it is whole.
    new = disks.leads and own.digest != digest
    target = directory.parent / staging_name() if new else directory
    held = frozenset() if new else own.files
    disks.on_each(lambda: _make(store, target) if new else None)
    for record in manifest.files.values():
        holders = [
            r
            for r, each in enumerate(offers)
            if each.digest == digest and record.path in each.files
        ]
        if len(holders) == sum(leaders):
            continue
        lacks = disks.leads and record.path not in held
        disks.copy(store, record, holders[0], directory, target if lacks else None)

    def publish_copy() -> None:
        if new:
            names = store.names(directory.parent)
            if directory.name in names:
                store.rename(
                    directory, directory.parent / aside_name(directory.name, "left", names)
                )
            store.write_bytes(target / MANIFEST, chosen.manifest)
            store.sync_dir(target)
            store.rename(target, directory)
        store.sync_dir(directory)
        store.sync_dir(directory.parent)

    disks.on_each(publish_copy)


def _make(store: Store, staging: Path) -> None:
    for directory in (staging.parent, staging, staging / SHARDS):
        store.mkdir(directory)


def _publish(store: Store, staging: Path, manifest: Manifest, generation: int) -> Path:
    store.sync_dir(staging / SHARDS)
    final, digest = publish(store, staging, manifest, generation)
    point_latest(store, final, manifest, digest)
    return final


def _created(store: Store, directory: Path, record: FileRecord) -> FileWriter:
    for folder in reversed(Path(record.path).parents[:-1]):
        store.mkdir(directory / folder)
    store.remove(directory / record.path)  # a damaged one
    return store.create(directory / record.path, record.size)


def _read(reader: FileReader, size: int) -> bytes:
    return bytes(reader.read_piece(size))


def _raise_first(failures: list[Exception]) -> None:
    if failures:
        raise failures[0]
