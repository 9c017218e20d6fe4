"""Checkpoints: written whole or not at all, verified before use, and never able to run code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.lazy import lazy_names

if TYPE_CHECKING:
    from loopkit.checkpoint.async_writer import BackgroundWriter
    from loopkit.checkpoint.discovery import (
        Entry,
        detach_after,
        has_checkpoints,
        load_checkpoint,
        load_newest,
        load_snapshot,
        newest_valid,
        resolve_checkpoint,
        scan,
    )
    from loopkit.checkpoint.format import checkpoints_dir
    from loopkit.checkpoint.lock import LOCK, RunLock
    from loopkit.checkpoint.node_disks import (
        NodeDisks,
        complete_on_nodes,
        find_on_nodes,
        write_on_nodes,
    )
    from loopkit.checkpoint.reader import read_checkpoint, verify_checkpoint
    from loopkit.checkpoint.retention import apply_retention, to_delete
    from loopkit.checkpoint.schema import check_state, reading
    from loopkit.checkpoint.sharded_writer import write_sharded
    from loopkit.checkpoint.snapshot import Shard, ShardedTensor, Snapshot
    from loopkit.checkpoint.staging import clean
    from loopkit.checkpoint.store import Store
    from loopkit.checkpoint.writer import sync_logs, write_checkpoint

_HOMES = {
    "async_writer": ("BackgroundWriter",),
    "discovery": (
        "Entry", "detach_after", "has_checkpoints", "load_checkpoint", "load_newest", "load_snapshot",
        "newest_valid", "resolve_checkpoint", "scan",
    ),
    "format": ("checkpoints_dir",),
    "lock": ("LOCK", "RunLock"),
    "node_disks": ("NodeDisks", "complete_on_nodes", "find_on_nodes", "write_on_nodes"),
    "reader": ("read_checkpoint", "verify_checkpoint"),
    "retention": ("apply_retention", "to_delete"),
    "schema": ("check_state", "reading"),
    "sharded_writer": ("write_sharded",),
    "snapshot": ("Shard", "ShardedTensor", "Snapshot"),
    "store": ("Store",),
    "staging": ("clean",),
    "writer": ("sync_logs", "write_checkpoint"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LOCK", "BackgroundWriter", "Entry", "NodeDisks", "RunLock", "Shard", "ShardedTensor", "Snapshot", "Store",
    "apply_retention", "check_state", "checkpoints_dir", "clean", "complete_on_nodes", "detach_after", "find_on_nodes",
    "has_checkpoints", "load_checkpoint", "load_newest", "load_snapshot", "newest_valid", "read_checkpoint", "reading",
    "resolve_checkpoint", "scan", "sync_logs", "to_delete", "verify_checkpoint", "write_checkpoint", "write_on_nodes",
    "write_sharded",
]  # fmt: skip

# To define a Task, nothing of this is needed.
__getattr__, __dir__ = lazy_names("loopkit.checkpoint", _HOME_OF)
