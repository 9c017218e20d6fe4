"""Checkpoints: written whole or not at all, verified before use, and never able to run code."""

from loopkit.checkpoint.async_writer import BackgroundWriter
from loopkit.checkpoint.discovery import (
    Entry,
    leave_behind,
    load_newest,
    load_snapshot,
    newest_good,
    scan,
)
from loopkit.checkpoint.format import Part, Pieces, Snapshot, checkpoints_dir
from loopkit.checkpoint.lock import RunLock
from loopkit.checkpoint.reader import read, verify
from loopkit.checkpoint.retention import apply, plan
from loopkit.checkpoint.sharded_writer import write_together
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.writer import clean, write

__all__ = [
    "BackgroundWriter",
    "Entry",
    "Part",
    "Pieces",
    "RunLock",
    "Snapshot",
    "Store",
    "apply",
    "checkpoints_dir",
    "clean",
    "leave_behind",
    "load_newest",
    "load_snapshot",
    "newest_good",
    "plan",
    "read",
    "scan",
    "verify",
    "write",
    "write_together",
]
