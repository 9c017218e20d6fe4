"""Mirror: a thread that brings what a run writes on this machine into a store."""

from __future__ import annotations

import logging
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loopkit.checkpoint import Store, checkpoints_dir
from loopkit.checkpoint.format import parse_name
from loopkit.checkpoint.manifest import Manifest
from loopkit.checkpoint.reader import read_manifest
from loopkit.checkpoint.retention import delete_checkpoint
from loopkit.checkpoint.staging import staging_name
from loopkit.errors import CheckpointError, LoopkitError, LoopkitWarning, RunDirError
from loopkit.files import link_tree
from loopkit.storage.checkpoints import Kept, RemoteCheckpoints
from loopkit.storage.local_copy import mirrored_files
from loopkit.storage.owner import Owner
from loopkit.storage.remote_files import Remote
from loopkit.storage.retries import Retries

logger = logging.getLogger(__name__)

LOGS_EVERY = 30.0
"""Seconds from one upload of changed logs to the next, at least."""
PATIENCE = 300.0
"""Seconds that the end of a run waits for a store that fails all the time."""
WARN_AFTER = 60.0
"""Seconds of failures after which a warning says so, while the run trains."""
MOST_WAITING = 8
"""How many checkpoints wait for a slow store, where more are to be kept."""


class Mirror:
    """Uploads checkpoints, newest first, and logs; deletes old checkpoints in the store.

    Nothing waits for the thread but ``finish``. It tries without end while the run trains.

    Args:
        remote: the place of the run.
        checkpoints: what the store holds.
        owner: the right to write there.
        local: the run directory on this machine.
        kept: which checkpoints the store keeps.
        files: the files of the run directory that the store has, in the state given.
    """

    def __init__(
        self,
        remote: Remote,
        checkpoints: RemoteCheckpoints,
        owner: Owner,
        local: Path,
        kept: Kept,
        files: dict[str, tuple[int, int]],
    ) -> None:
        self._retries = Retries(float("inf"), refusals=True)
        self._remote = remote.with_retries(self._retries)
        self._checkpoints = checkpoints
        checkpoints.remote = checkpoints.remote.with_retries(self._retries)
        self._owner = owner
        self._local = local
        self._kept = kept
        self._files = dict(files)
        self._logs_at = 0.0
        self._done: set[str] = set(checkpoints.names())
        self._sent: dict[str, set[str]] = {}
        self._uploading = ""
        self._failure: Exception | None = None
        self._wake = threading.Event()
        self._closing = False
        self._warned = False
        self._thread = threading.Thread(target=self._run, name="loopkit-upload", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def saved(self) -> None:
        """Note that a checkpoint was saved, and free the space of those that are uploaded.

        Called in the thread that saves, after its own retention.

        Raises:
            RunDirError: another run has taken the place.
        """
        if self._failure is not None:
            raise RunDirError(f"the upload has ended: {self._failure}") from self._failure
        self._owner.check()
        self._free()
        self._wake.set()
        if self._retries.seconds > WARN_AFTER and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._remote.url} has failed for {self._retries.seconds:.0f} s: "
                f"{self._retries.trouble}. Training continues, and the upload is tried again until "
                f"the end of the run. Checkpoints are in {self._local}",
                LoopkitWarning,
                stacklevel=2,
            )

    def waiting(self) -> list[str]:
        """Return the checkpoints that are to be uploaded, in this order; the thread has one of them."""
        return [name for name in reversed(self._names()) if name not in self._done]

    def _names(self) -> list[str]:
        """Return the names of the local checkpoints, oldest first."""
        keys = {
            name: key
            for name in Store().names(checkpoints_dir(self._local))
            if (key := parse_name(name))
        }
        return sorted(keys, key=keys.__getitem__)

    def drain(self, seconds: float) -> bool:
        """Wait until no checkpoint waits, or the store has failed for too long.

        Returns:
            False if neither came within ``seconds``.
        """
        end = time.monotonic() + seconds
        self._wake.set()
        while self.waiting() and self._thread.is_alive() and self._retries.seconds < PATIENCE:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True

    def finish(self) -> str:
        """Upload what is left, and end the thread.

        Returns:
            Why something is not uploaded; "" if everything is.
        """
        self._retries.restart(PATIENCE)
        self._closing = True
        self._wake.set()
        # A join without a limit can miss a Ctrl-C that comes right before it begins to wait.
        while self._thread.is_alive():
            self._thread.join(0.2)
        if self._failure is not None:
            return str(self._failure)
        with suppress(LoopkitError):
            self._free()
        return ""

    def leave(self) -> None:
        """End the thread at its next request, and wait for it only that long."""
        self._retries.stopped.set()
        self._retries.restart(0.0)
        self._closing = True
        self._wake.set()

    def _run(self) -> None:
        while True:
            closing = self._closing
            try:
                self._round()
                if closing:
                    return
            except Exception as error:
                logger.warning("the upload to %s failed: %s", self._remote.url, error)
                if self._closing or not isinstance(error, (CheckpointError, OSError)):
                    self._failure = error
                    return
            self._wake.wait(LOGS_EVERY)
            self._wake.clear()

    def _round(self) -> None:
        """Upload everything that is there."""
        self._owner.check()
        self._checkpoints.remove_parts(set(self.waiting()))
        while names := self.waiting():
            self._upload(self._next(names))
            self._delete_old()
        self._delete_old()
        if self._closing or time.monotonic() - self._logs_at > LOGS_EVERY:
            self._upload_logs()

    def _next(self, names: list[str]) -> str:
        """Return the newest; or else one that was begun before a newer one was saved."""
        return self._uploading if self._uploading in names else names[0]

    def _upload(self, name: str) -> None:
        self._uploading = name
        with self._held(name) as directory:
            manifest = None
            if directory is not None:
                with suppress(CheckpointError):
                    manifest = read_manifest(Store(), directory)
            if directory is not None and manifest is not None and self._is_kept(name, manifest):
                sent = self._sent.setdefault(name, set())
                self._checkpoints.upload(directory, name, sent, self._before_manifest)
        self._done.add(name)
        self._sent.pop(name, None)
        self._uploading = ""

    def _delete_old(self) -> None:
        for old in self._checkpoints.too_many(self._kept):
            self._owner.check()
            self._checkpoints.remove(old)

    def _is_kept(self, name: str, manifest: Manifest) -> bool:
        """Return whether retention would not delete the checkpoint at once."""
        return name not in self._checkpoints.too_many(self._kept, more={name: manifest})

    def _before_manifest(self) -> None:
        # No log in the store may lack what a checkpoint there has passed.
        self._upload_logs()
        self._owner.check()

    def _upload_logs(self) -> None:
        started = time.monotonic()
        for name, state in mirrored_files(self._local).items():
            if self._files.get(name) != state:
                with suppress(FileNotFoundError):  # it was deleted meanwhile
                    self._remote.put_file(name, self._local / name)
                    self._files[name] = state
        # Long logs on a slow store take at most a tenth of the time.
        self._logs_at = time.monotonic() + 9 * (time.monotonic() - started)

    @contextmanager
    def _held(self, name: str) -> Iterator[Path | None]:
        """Inside, a second name holds the files of a checkpoint, which retention may delete."""
        source = checkpoints_dir(self._local) / name
        held = source.with_name(staging_name())
        try:
            try:
                link_tree(source, held)
            except (OSError, shutil.Error):
                yield None  # it was deleted meanwhile
                return
            yield held
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def _free(self) -> None:
        """Delete the local checkpoints that are uploaded, except the newest and the best one."""
        store, parent = Store(), checkpoints_dir(self._local)
        names = self._names()
        waiting = [name for name in names if name not in self._done]
        needed = {names[-1], self._best(store, parent, names)} if names else set()
        spare = [name for name in names if name in self._done]
        too_many = len(waiting) - max(MOST_WAITING, self._kept.keep or 0)
        dropped = [n for n in waiting[: max(0, too_many)] if n not in needed | {self._uploading}]
        for name in [*spare, *dropped]:
            if name not in needed:
                self._done.add(name)
                delete_checkpoint(store, parent / name)
        if dropped:
            warnings.warn(
                f"{self._remote.url} takes checkpoints more slowly than they are saved: "
                f"{', '.join(dropped)} is not uploaded, and deleted here. Save less often, with "
                "Checkpoint(every=...)",
                LoopkitWarning,
                stacklevel=2,
            )

    def _best(self, store: Store, parent: Path, names: list[str]) -> str:
        """Return the best of the local checkpoints; "" without a monitor."""
        best = self._kept.best
        if best is None:
            return ""
        metrics = {}
        for name in names:
            with suppress(CheckpointError):
                metrics[name] = read_manifest(store, parent / name).meta.get("metrics") or {}
        ranked = best.ranked(list(metrics), lambda name: metrics[name])
        return ranked[0] if ranked else ""
