"""One run per directory: a lock that the system releases when the process ends, however it ends."""

from __future__ import annotations

import os
import platform
import time
import weakref
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any

from loopkit.checkpoint.format import dump_json, load_json
from loopkit.checkpoint.store import Store
from loopkit.errors import CheckpointError, RunDirError

LOCK = ".lock"
# A program that only looks whether the lock is held holds it for a moment.
_TRIES, _PAUSE = 5, 0.03


class RunLock:
    """Holds a run directory from construction until :meth:`release` or the end of the process.

    The lock file stays in the directory. Its content only serves the error message.

    Raises:
        RunDirError: the directory cannot be written, or another run holds it. The message names
            the run, process, host and start of the holder.
    """

    def __init__(self, run_dir: Path, run_id: str = "", store: Store | None = None):
        self.path = Path(run_dir) / LOCK
        self._store = store or Store()
        about = {
            "run": run_id,
            "host": platform.node(),
            "pid": os.getpid(),
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        self._handle = self._store.lock(self.path, dump_json(about))
        for _ in range(_TRIES):
            if self._handle is None:
                time.sleep(_PAUSE)
                self._handle = self._store.lock(self.path, dump_json(about))
        if self._handle is None:
            raise RunDirError(
                f"{run_dir} is in use by {_holder(self._store, self.path)}. "
                "Choose another run directory, or end that run."
            )
        # A forked child (a data worker) would hold the lock for as long as it outlives this
        # process, so the child closes its copy. Windows has no fork.
        if hasattr(os, "register_at_fork"):
            this = weakref.ref(self)
            os.register_at_fork(after_in_child=lambda: _close_copy(this))

    def release(self) -> None:
        """Let another run use the directory; a second call does nothing."""
        self._close(clear=True)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def __del__(self) -> None:
        self._close(clear=False)

    def _close(self, clear: bool) -> None:
        # In a forked child this closes a copy of the handle, which keeps the parent's lock.
        handle, self._handle = getattr(self, "_handle", None), None
        if handle is not None:
            self._store.unlock(handle, clear)


def _close_copy(lock: weakref.ref[RunLock]) -> None:
    found = lock()
    if found is not None:
        found._close(clear=False)


def _holder(store: Store, path: Path) -> str:
    """Describe the run that holds a lock, as far as the lock file says."""
    try:
        about: Any = load_json(store.lock_content(path, 4096), str(path))
        run = f"run {about['run']!r}, " if about["run"] else ""
        return f"{run}process {about['pid']} on {about['host']}, started {about['started']}"
    except (CheckpointError, FileNotFoundError, TypeError, KeyError):
        return "another run"
