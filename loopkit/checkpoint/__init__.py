"""Checkpoints: written whole or not at all, verified before use, and never able to run code."""

from loopkit.checkpoint.async_writer import BackgroundWriter
from loopkit.checkpoint.discovery import (
    Entry,
    detach_after,
    load_newest,
    load_snapshot,
    newest_valid,
    scan,
)
from loopkit.checkpoint.format import Shard, ShardedTensor, Snapshot, checkpoints_dir
from loopkit.checkpoint.lock import RunLock
from loopkit.checkpoint.reader import read, verify
from loopkit.checkpoint.retention import apply_retention, to_delete
from loopkit.checkpoint.sharded_writer import write_together
from loopkit.checkpoint.store import Store
from loopkit.checkpoint.writer import clean, write

__all__ = [
    "BackgroundWriter",
    "Entry",
    "Shard",
    "ShardedTensor",
    "RunLock",
    "Snapshot",
    "Store",
    "apply_retention",
    "checkpoints_dir",
    "clean",
    "detach_after",
    "load_newest",
    "load_snapshot",
    "newest_valid",
    "to_delete",
    "read",
    "scan",
    "verify",
    "write",
    "write_together",
]
