"""RunStorage: a run in a store, from the first look at what is there to the end of the upload."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

from loopkit.checkpoint import Store, checkpoints_dir, clean, newest_valid, verify_checkpoint
from loopkit.checkpoint.format import CHECKPOINTS, MANIFEST, aside_name, parse_name
from loopkit.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LoopkitWarning,
    NoValidCheckpointError,
    RunDirError,
    StorageError,
)
from loopkit.storage.checkpoints import Kept, RemoteCheckpoints
from loopkit.storage.local_copy import known_owners, mirrored_files, note_owner
from loopkit.storage.mirror import Mirror
from loopkit.storage.owner import Owner
from loopkit.storage.remote_files import Remote
from loopkit.storage.retries import Retries
from loopkit.storage.run_files import fetch_file, files_of_run
from loopkit.storage.urls import child

logger = logging.getLogger(__name__)

AUTO = "auto"
OPEN_PATIENCE = 60.0
"""Seconds that a start waits for a store that fails all the time."""


class RunStorage:
    """The place of a run in a store, and its copy on this machine. Rank 0 alone has one.

    The run trains in the local copy, as in any run directory. ``open`` brings there what a resume
    needs; after ``start``, a thread brings to the store what the run writes.

    Args:
        url: the place of the run.
        local: the run directory on this machine, whose lock this process holds.
        kept: which checkpoints the store keeps.
        say: shows a line to the user.

    Attributes:
        url, local: as given.
    """

    def __init__(
        self,
        url: str,
        local: Path,
        *,
        kept: Kept | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.url = url
        self.local = local
        self._say = say
        self._kept = kept or Kept()
        self._fetched: dict[str, tuple[int, int]] = {}
        self._remote = Remote(url, Retries(OPEN_PATIENCE))
        self._checkpoints = RemoteCheckpoints(self._remote)
        self._owner = Owner(self._remote)
        self._mirror: Mirror | None = None

    def open(self, resume: str | None) -> None:
        """Take the place, and bring what the run continues from to this machine.

        Args:
            resume: "auto", or the name of a checkpoint of this run; None if the run continues from
                none of its own.

        Raises:
            RunDirError: another run uses the place, or it holds checkpoints and ``resume`` is None.
            NoValidCheckpointError: there are checkpoints, and none is valid.
            CheckpointError: there is no checkpoint of the given URL.
            StorageError: the store does not answer, or refuses.
        """
        before = self._owner.look().get("id")
        names = self._checkpoints.refresh().names()
        if names and resume is None:
            raise RunDirError(
                f"{self.url} holds {len(names)} checkpoint(s), up to {names[-1]}: pass "
                "resume='auto' to continue from the newest, or another run_dir"
            )
        known = known_owners(self.local)
        continues = before is not None and before in known
        note_owner(self.local, self.url, [*(known if continues else ()), self._owner.id])
        self._owner.take(self._say)
        self._checkpoints.refresh()  # a run that this one has waited for may have saved
        if not continues:
            self._set_local_aside()
            self._fetch_files()
        Store().mkdir(checkpoints_dir(self.local))
        clean(Store(), self.local)
        if resume is not None:
            self._fetch_checkpoints(resume)

    def path_of(self, url: str) -> Path | None:
        """Return the local path of this run, or of a checkpoint of it; None for any other URL."""
        if url == self.url:
            return self.local
        name = self.name_of(self.url, url)
        return checkpoints_dir(self.local) / name if name else None

    @staticmethod
    def name_of(run: str, url: str) -> str | None:
        """Return the name of the checkpoint of a run that a URL names; None if it names none."""
        parent, _, name = url.rpartition("/")
        return name if parent == child(run, CHECKPOINTS) and parse_name(name) else None

    def start(self) -> None:
        """Start to upload. Until then nothing but the owner of the place has changed in the store."""
        place = self._remote, self._checkpoints, self._owner, self.local
        self._mirror = Mirror(*place, self._kept, self._fetched)
        self._mirror.start()

    def saved(self) -> None:
        """Note that a checkpoint was saved. Raises what :meth:`Mirror.saved` raises."""
        if self._mirror is not None:
            self._mirror.saved()

    def drain(self, seconds: float) -> bool:
        """Wait for the upload of what was saved. Return False if it needs longer than ``seconds``."""
        return self._mirror is None or self._mirror.drain(seconds)

    def continues_from(self, path: Path) -> None:
        """Set later checkpoints of the store aside, because the run continues from this one."""
        key = parse_name(path.name) or (0, 0)
        newer = [name for name in self._checkpoints.names() if (parse_name(name) or key) > key]
        moved = [self._checkpoints.move_aside(name, "left") for name in reversed(newer)]
        if moved:
            logger.warning("in %s, later checkpoints are set aside: %s", self.url, ", ".join(moved))

    def close(self, *, raises: bool) -> None:
        """Finish the upload, and leave the place to others. Ctrl-C ends the wait.

        Args:
            raises: whether an upload that does not finish is an error; otherwise it is a warning.

        Raises:
            StorageError: it did not finish. Says where the local copy is.
        """
        try:
            reason = self._finish()
        except KeyboardInterrupt:
            self.leave()
            return
        self._owner.release(unused=self._mirror is None)
        if not reason:
            return
        if raises:
            raise StorageError(self._incomplete(reason))
        warnings.warn(self._incomplete(reason), LoopkitWarning, stacklevel=2)

    def leave(self) -> None:
        """End at once, and warn of what is not uploaded."""
        if self._mirror is not None:
            self._mirror.leave()
        self._owner.release(unused=self._mirror is None)
        if self._mirror is not None and self._mirror.waiting():
            warnings.warn(self._incomplete("Ctrl-C ended it"), LoopkitWarning, stacklevel=2)

    def _finish(self) -> str:
        if self._mirror is None:
            return ""
        waiting = self._mirror.waiting()
        if waiting:
            self._say(
                f"uploading {len(waiting)} checkpoint{'s' if len(waiting) > 1 else ''} to {self.url} "
                f"(Ctrl-C leaves; the local copy is {self.local})"
            )
        return self._mirror.finish()

    def _incomplete(self, reason: str) -> str:
        return (
            f"the upload to {self.url} is not complete: {reason}. The run is whole in {self.local}. "
            f"Fit(run_dir={self.url!r}, resume='auto') on this machine uploads the rest"
        )

    def _set_local_aside(self) -> None:
        """Clear the local copy, whose run is not the one that the store holds now.

        What the store does not have moves into a folder of the copy, which is a run directory.
        """
        store, parent = Store(), checkpoints_dir(self.local)
        entries = [name for name in store.names(self.local) if not name.startswith(".")]
        checkpoints = [parent / name for name in filter(parse_name, store.names(parent))]
        if all(map(self._is_same, checkpoints)):
            for name in entries:
                if name != CHECKPOINTS:
                    store.remove_tree(self.local / name)
            return
        aside = self.local / aside_name("", "left", store.names(self.local))
        store.mkdir(aside)
        for name in entries:
            store.rename(self.local / name, aside / name)
        warnings.warn(
            f"{self.local} held checkpoints that {self.url} does not have, since another run has "
            f"written there. They are in {aside}, and can be deleted, or resumed from by that path",
            LoopkitWarning,
            stacklevel=2,
        )

    def _is_same(self, path: Path) -> bool:
        try:
            return (path / MANIFEST).read_bytes() == self._checkpoints.text(path.name)
        except (CheckpointError, OSError):
            return False

    def _fetch_files(self) -> None:
        """Bring everything but checkpoints here, such as logs and run.json."""
        for name, listed in files_of_run(self._remote).items():
            fetch_file(self._remote, name, listed, self.local)
        self._fetched = mirrored_files(self.local)

    def _fetch_checkpoints(self, name: str) -> None:
        """Bring the newest checkpoint here, or the named one; and the best one."""
        store, parent = Store(), checkpoints_dir(self.local)
        if name == AUTO:
            self._fetch_newest(store)
        elif name not in store.names(parent) or verify_checkpoint(store, parent / name):
            if name not in self._checkpoints.names():
                raise CheckpointError(
                    f"resume={self._checkpoints.url(name)!r}: there is no such checkpoint"
                )
            self._checkpoints.fetch(name, parent)
        if self._kept.best is not None:
            entries = [entry for entry in self._checkpoints.entries() if not entry.problem]
            ranked = self._kept.best.ranked(entries, lambda entry: entry.metrics)
            if ranked and ranked[0].path.name not in store.names(parent):
                self._checkpoints.fetch(ranked[0].path.name, parent)

    def _fetch_newest(self, store: Store) -> None:
        """Bring the newest valid checkpoint here, unless a newer one is here already."""
        try:
            found = newest_valid(store, self.local, kind="full")
        except NoValidCheckpointError as error:
            if not self._checkpoints.names():
                raise
            logger.warning("%s", error)
            found = None
        here = (parse_name(found.name) if found else None) or (-1, 0)
        problems = []
        for name in reversed(self._checkpoints.names()):
            if (parse_name(name) or here) <= here:
                break
            try:
                if self._checkpoints.manifest(name).meta.get("kind", "full") != "full":
                    continue
                self._say(f"downloading {self._checkpoints.url(name)}")
                found = self._checkpoints.fetch(name, checkpoints_dir(self.local))
                break
            except CorruptCheckpointError as error:
                problems.append((name, str(error)))
        if found is None and self._checkpoints.names() and not problems:
            raise CheckpointError(
                f"{self.url} holds weights alone, which cannot be resumed: load them into the task, "
                "and train on in another run_dir"
            )
        if found is None and problems:
            listed = "\n".join(f"  {name}: {problem}" for name, problem in problems)
            raise NoValidCheckpointError(
                f"none of the checkpoints in {self._checkpoints.remote.url} can be trusted:\n{listed}\n"
                "Move them away to start again, or name one to resume from."
            )
        for name, problem in problems:
            kept = self._checkpoints.move_aside(name, "corrupt")
            warnings.warn(
                f"corrupt checkpoint: {problem}. It is kept as {kept}; {found.name if found else ''} "
                "is used.",
                LoopkitWarning,
                stacklevel=2,
            )
