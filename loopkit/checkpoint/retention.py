"""Retention: which checkpoints to keep, and how the others are deleted without leaving half of one."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

from loopkit.checkpoint.discovery import Entry, scan
from loopkit.checkpoint.format import DELETING
from loopkit.checkpoint.reader import verify_checkpoint
from loopkit.checkpoint.store import Store
from loopkit.checks import checked_int
from loopkit.monitor import Monitor

logger = logging.getLogger(__name__)


def to_delete(
    entries: Sequence[Entry], keep: int | None, keep_best: int = 1, best: Monitor | None = None
) -> list[Path]:
    """Return the checkpoints to delete, oldest first: a pure function of their manifests.

    Kept are the ``keep`` newest by (step, generation), the newest of each kind, and the
    ``keep_best`` best by the metric ``best``. The best one is always kept; of equal ones the
    earlier counts as better. Entries with a problem are neither counted nor deleted.

    Args:
        keep: None keeps all.

    Raises:
        OptionError: ``keep`` is below 1, or ``keep_best`` below 0.
    """
    checked_int(keep, "keep", or_none=True)
    checked_int(keep_best, "keep_best", at_least=0)
    if keep is None:
        return []
    valid = sorted((e for e in entries if e.problem is None), key=lambda e: (e.step, e.generation))
    kept = {entry.path for entry in valid[-keep:]}
    kept |= {entry.path for entry in {entry.kind: entry for entry in valid}.values()}
    if best is not None:
        ranked = best.ranked(valid, lambda entry: entry.metrics)
        kept |= {entry.path for entry in ranked[: max(1, keep_best)]}
    return [entry.path for entry in valid if entry.path not in kept]


def apply_retention(
    store: Store,
    run_dir: Path,
    keep: int | None,
    keep_best: int = 1,
    best: Monitor | None = None,
    trusted: set[Path] | None = None,
) -> list[Path]:
    """Delete the checkpoints that :func:`to_delete` names, and return their paths.

    Every checkpoint that is counted has been read back once and found valid: those in ``trusted``
    earlier, the others now.

    Args:
        trusted: checkpoints that this process wrote or loaded. Those verified now are added.
    """
    if keep is None:
        return []
    known = set() if trusted is None else trusted
    entries = []
    for entry in scan(store, run_dir):
        if entry.problem is None and entry.path not in known:
            if verify_checkpoint(store, entry.path):
                continue
            known.add(entry.path)
        entries.append(entry)
    gone = to_delete(entries, keep, keep_best, best)
    for path in gone:
        delete_checkpoint(store, path)
        known.discard(path)
    return gone


def delete_checkpoint(store: Store, path: Path) -> None:
    """Delete a checkpoint whole: one that is half deleted is never taken for a checkpoint."""
    hidden = path.with_name(f"{DELETING}{path.name}-{secrets.token_hex(4)}")
    store.rename(path, hidden)  # durably, before anything in it is deleted
    store.sync_dir(path.parent)
    store.remove_tree(hidden)
    logger.debug("deleted checkpoint %s", path)
