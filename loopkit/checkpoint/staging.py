"""Staging directories: where a checkpoint is written before it gets its name, and who wrote there."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loopkit.checkpoint.format import DELETING, STAGING, checkpoints_dir
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.streams import FileWriter
from loopkit.errors import LoopkitError

_OWNER = re.compile(r"\.staging-(?P<host>[\w.]+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]+")


def staging_name() -> str:
    """Return a new name for a staging directory, which says which process made it."""
    pid = os.getpid()
    return f"{STAGING}{_host()}-{pid}-{start_time(pid)}-{secrets.token_hex(4)}"


@contextmanager
def removed_on_error(store: Store, staging: Path) -> Iterator[None]:
    """Remove ``staging`` if the block raises."""
    try:
        yield
    except BaseException:
        with suppress(LoopkitError, OSError):
            store.remove_tree(staging)
        raise


def write_below(store: Store, directory: Path, name: str, data: bytes) -> FileWriter:
    """Write a new durable file, and make the folders in ``name`` that do not exist.

    The entries of ``directory`` itself are not synced.
    """
    folders = [directory / folder for folder in reversed(Path(name).parents[:-1])]
    for folder in folders:
        store.mkdir(folder)
    file = store.write_bytes(directory / name, data)
    for folder in folders:
        store.sync_dir(folder)
    return file


def clean(store: Store, run_dir: Path) -> list[str]:
    """Remove what dead writers left in a run directory, and return the names removed.

    Call it with the run's lock held. Anything that a live process of this machine is writing stays.
    """
    parent = checkpoints_dir(run_dir)
    gone = [
        name
        for name in store.names(parent)
        if name.startswith(DELETING) or (name.startswith(STAGING) and not _owner_lives(name))
    ]
    for name in gone:
        store.remove_tree(parent / name)
    if gone:
        store.sync_dir(parent)
    return gone


def _host() -> str:
    return re.sub(r"[^\w.]", "_", platform.node())[:64] or "unknown"


def start_time(pid: int) -> int:
    """Return when a process started, in clock ticks since boot; 0 if the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _owner_lives(name: str) -> bool:
    """Return whether the process that made a staging directory still runs on this machine."""
    match = _OWNER.fullmatch(name)
    if match is None or match["host"] != _host():
        return False
    pid = int(match["pid"])
    # By now another process may have the same number; then it started at another time.
    return is_running(pid) and start_time(pid) == int(match["start"])


def is_running(pid: int) -> bool:
    """Return whether a process of this machine with this number runs."""
    if sys.platform == "win32":
        return _is_running_on_windows(pid)
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _is_running_on_windows(pid: int) -> bool:
    """Ask for the exit code of a process. ``os.kill`` would send it a signal on Windows."""
    kernel: Any = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined, unused-ignore]
    kernel.OpenProcess.restype = ctypes.c_void_p
    handle = kernel.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
    if not handle:
        return False
    code = ctypes.c_ulong()
    kernel.GetExitCodeProcess(ctypes.c_void_p(handle), ctypes.byref(code))
    kernel.CloseHandle(ctypes.c_void_p(handle))
    return code.value == 259  # STILL_ACTIVE
