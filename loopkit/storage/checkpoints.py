"""Checkpoints in a store: one exists there if and only if its manifest does, which is written last."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loopkit.checkpoint import Entry, Store, digests, to_delete
from loopkit.checkpoint.format import (
    CHECKPOINTS,
    LATEST,
    MANIFEST,
    MAX_JSON,
    aside_name,
    parse_name,
    step_name,
)
from loopkit.checkpoint.manifest import FileRecord, Manifest, parse_manifest
from loopkit.checkpoint.reader import read_manifest
from loopkit.checkpoint.staging import removed_on_error, staging_name
from loopkit.checkpoint.writer import latest_json
from loopkit.errors import CheckpointError, CorruptCheckpointError, DiskFullError, StorageError
from loopkit.monitor import Monitor
from loopkit.storage.local_copy import STAGING_VARIABLE
from loopkit.storage.remote_files import Listed, Remote
from loopkit.storage.urls import child

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kept:
    """Which checkpoints are kept, as ``loopkit.checkpoint.to_delete`` has it."""

    keep: int | None = None
    keep_best: int = 1
    best: Monitor | None = None


class RemoteCheckpoints:
    """The checkpoints of one run in a store.

    Args:
        remote: the run's place in the store.
        below: the folder of the checkpoints there; "" for the place itself.

    Attributes:
        remote: of that folder.
        files: the files of each folder in it, by their names in it. ``refresh`` reads them.
    """

    def __init__(self, remote: Remote, below: str = CHECKPOINTS) -> None:
        self.remote = remote.below(below) if below else remote
        self.files: dict[str, dict[str, Listed]] = {}
        self._manifests: dict[str, Manifest] = {}
        self._texts: dict[str, bytes] = {}  # of the manifests

    def refresh(self) -> RemoteCheckpoints:
        """Read what is there now, and return this object."""
        found: dict[str, dict[str, Listed]] = {}
        for path, listed in self.remote.find().items():
            folder, inside, name = path.partition("/")
            if inside:
                found.setdefault(folder, {})[name] = listed
        self.files = found
        self._manifests = {n: m for n, m in self._manifests.items() if n in found}
        return self

    def names(self) -> list[str]:
        """Return the names of the checkpoints, oldest first, without those that were set aside."""
        found = [name for name, files in self.files.items() if MANIFEST in files]
        return sorted(filter(parse_name, found), key=lambda name: parse_name(name) or (0, 0))

    def url(self, name: str) -> str:
        """Return the URL of a checkpoint."""
        return child(self.remote.url, name)

    def manifest(self, name: str) -> Manifest:
        """Return the manifest of a checkpoint, checked in itself and against the name.

        Raises:
            CorruptCheckpointError: it is damaged or missing.
            CheckpointError: a newer loopkit wrote it.
        """
        if name not in self._manifests:
            what = f"{self.url(name)}/{MANIFEST}"
            try:
                data = self.remote.read(f"{name}/{MANIFEST}", MAX_JSON)
            except FileNotFoundError:
                raise CorruptCheckpointError(f"{what} is missing") from None
            manifest = parse_manifest(data, what)
            own = step_name(manifest.meta["step"], manifest.generation)
            if parse_name(name) and name != own:
                raise CorruptCheckpointError(f"{what} is that of {own}")
            self._manifests[name], self._texts[name] = manifest, data
        return self._manifests[name]

    def text(self, name: str) -> bytes:
        """Return the bytes of a manifest. Raises what :meth:`manifest` raises."""
        self.manifest(name)
        return self._texts[name]

    def entries(self) -> list[Entry]:
        """Return the checkpoints, oldest first, with what is wrong as far as sizes tell."""
        found = []
        for name in self.names():
            key = parse_name(name) or (0, 0)
            try:
                manifest = self.manifest(name)
                self._check_sizes(name, manifest)
                found.append(Entry(Path(name), *key, manifest))
            except CheckpointError as error:
                found.append(Entry(Path(name), *key, None, str(error)))
        return found

    def upload(
        self, directory: Path, name: str, sent: set[str], before_manifest: Callable[[], None]
    ) -> None:
        """Upload a checkpoint of this machine: its content first, then its manifest.

        Args:
            directory: where it lies; a file in it must not change.
            name: its name.
            sent: the files that an earlier try has sent. Those that this one sends are added.
            before_manifest: called when all but the manifest is in the store.

        Raises:
            StorageError: a checkpoint of this name, with another content, is there.
        """
        manifest = read_manifest(Store(), directory)
        for record in manifest.files.values():
            if record.path not in sent:
                self.remote.put_file(f"{name}/{record.path}", directory / record.path)
                sent.add(record.path)
        before_manifest()
        data = (directory / MANIFEST).read_bytes()
        if not self.remote.put_new(f"{name}/{MANIFEST}", data):
            raise StorageError(
                f"{self.url(name)} is there with another content: another run writes to this place"
            )
        self._manifests[name], self._texts[name] = manifest, data
        sizes = {record.path: Listed(record.size, 0.0) for record in manifest.files.values()}
        self.files[name] = {**sizes, MANIFEST: Listed(len(data), 0.0)}
        if name == self.names()[-1]:
            self.remote.put(LATEST, latest_json(name, manifest, digests.of(data)))
        logger.info("uploaded checkpoint %s", self.url(name))

    def fetch(self, name: str, parent: Path) -> Path:
        """Download a checkpoint into ``parent``, under its name, and return its directory.

        It appears whole or not at all, and only if every byte is the one that was written.

        Raises:
            CorruptCheckpointError: it is not.
            DiskFullError: there is no room for it.
        """
        store, manifest = Store(), self.manifest(name)
        self._check_sizes(name, manifest)
        needed, free = manifest.size, shutil.disk_usage(parent).free
        if needed > free:
            raise DiskFullError(
                f"{self.url(name)} has {needed} bytes, and {free} are free in {parent}. Set "
                f"{STAGING_VARIABLE} to a folder on a larger disk"
            )
        staging = parent / staging_name()
        with removed_on_error(store, staging):
            store.mkdir(staging)
            for record in manifest.files.values():
                for folder in reversed(Path(record.path).parents[:-1]):
                    store.mkdir(staging / folder)
                with store.create(staging / record.path, record.size) as file:
                    for piece in self._pieces(name, record):
                        file.write(piece)
            store.write_bytes(staging / MANIFEST, self.text(name))
            store.sync_dir(staging)
            store.rename(staging, parent / name)
            store.sync_dir(parent)
        logger.info("downloaded checkpoint %s", self.url(name))
        return parent / name

    def problems(self, name: str) -> list[str]:
        """Read every byte of a checkpoint and return what is wrong, one line per file; [] if valid."""
        found = []
        try:
            manifest = self.manifest(name)
            self._check_sizes(name, manifest)
        except CheckpointError as error:
            return [str(error)]
        for record in manifest.files.values():
            try:
                for _ in self._pieces(name, record):
                    pass
            except CorruptCheckpointError as error:
                found.append(str(error))
        return found

    def _pieces(self, name: str, record: FileRecord) -> Iterator[bytes]:
        """Yield a file in pieces. Its end raises if a byte is not the one that was written."""
        digest = digests.like(record.digest)
        try:
            for piece in self.remote.pieces(f"{name}/{record.path}", record.size):
                digest.update(piece)
                yield piece
        except FileNotFoundError:
            raise CorruptCheckpointError(f"{self.url(name)}/{record.path} is missing") from None
        if digest.text != record.digest:
            raise CorruptCheckpointError(
                f"{self.url(name)}/{record.path}: its bytes are not those written (checksum)"
            )

    def _check_sizes(self, name: str, manifest: Manifest) -> None:
        for record in manifest.files.values():
            listed = self.files.get(name, {}).get(record.path)
            if listed is None:
                raise CorruptCheckpointError(f"{self.url(name)}/{record.path} is missing")
            if listed.size != record.size:
                raise CorruptCheckpointError(
                    f"{self.url(name)}/{record.path}: {listed.size} bytes, {record.size} were written"
                )

    def remove(self, name: str) -> None:
        """Delete a checkpoint: its manifest first, so that there is never half of one."""
        files = sorted(self.files.get(name, ()), key=lambda path: path != MANIFEST)
        self.remote.remove([f"{name}/{path}" for path in files])
        self.remote.remove_empty(name)
        self.files.pop(name, None)
        self._manifests.pop(name, None)
        logger.debug("deleted checkpoint %s", self.url(name))

    def move_aside(self, name: str, reason: str) -> str:
        """Rename a checkpoint to ``step-….reason-N``, and return its new name.

        It is copied, its manifest last, before the old one is deleted.
        """
        aside = aside_name(name, reason, self.files)
        for path in sorted(self.files[name], key=lambda path: path == MANIFEST):
            self.remote.copy(f"{name}/{path}", f"{aside}/{path}")
        self.files[aside] = dict(self.files[name])
        self.remove(name)
        return aside

    def remove_parts(self, kept: Collection[str]) -> None:
        """Delete what uploads and deletions that did not end have left, except under ``kept`` names."""
        for name, files in list(self.files.items()):
            if MANIFEST not in files and name not in kept and parse_name(name.partition(".")[0]):
                self.remove(name)

    def too_many(self, kept: Kept, more: Mapping[str, Manifest] | None = None) -> list[str]:
        """Return the names that retention deletes, if the store had the checkpoints of ``more`` too."""
        if kept.keep is None:
            return []
        entries = {entry.path.name: entry for entry in self.entries()}
        for name, manifest in (more or {}).items():
            entries[name] = Entry(Path(name), *(parse_name(name) or (0, 0)), manifest)
        gone = to_delete(list(entries.values()), kept.keep, kept.keep_best, kept.best)
        return [path.name for path in gone]
