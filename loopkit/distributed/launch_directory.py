"""The directory in which ranks tell their launcher why they failed."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "loopkit-launch-"
# A directory is locked right after it is made: until then its age protects it.
_YOUNG = 60.0


@contextmanager
def launch_directory() -> Iterator[Path]:
    """Make a directory, and remove it after the block.

    A launcher that is killed leaves its directory behind, so the next one of this user removes it.
    A lock on each directory tells that its launcher lives. The system frees it with the process.
    """
    _remove_left()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX))
    handle = _lock(directory)
    try:
        yield directory
    finally:
        _remove(directory, handle)


def _lock(directory: Path) -> int | None:
    """Lock a directory. Return None if another process holds the lock, or nothing can be locked."""
    from filelock import lock_descriptor

    with suppress(OSError):  # Windows opens no directories
        handle = os.open(directory, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with suppress(OSError):
            if lock_descriptor(handle, blocking=False):
                return handle
        os.close(handle)
    return None


def _remove_left() -> None:
    for directory in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            about = directory.lstat()
            mine = not hasattr(os, "geteuid") or about.st_uid == os.geteuid()
            if not mine or time.time() - about.st_mtime < _YOUNG:
                continue
            if (handle := _lock(directory)) is not None:
                _remove(directory, handle)


def _remove(directory: Path, handle: int | None) -> None:
    """Remove a directory, and then unlock it."""
    shutil.rmtree(directory, ignore_errors=True)
    if handle is not None:
        os.close(handle)
