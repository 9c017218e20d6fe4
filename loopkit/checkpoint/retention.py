"""Which checkpoints to keep, and deleting the others so that a kill leaves no half of one."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from loopkit.checkpoint.discovery import Entry, scan
from loopkit.checkpoint.format import DELETING
from loopkit.checkpoint.reader import verify
from loopkit.checkpoint.store import Store
from loopkit.checks import checked_int
from loopkit.monitor import Monitor


def to_delete(
    entries: Sequence[Entry], keep: int | None, keep_best: int = 1, best: Monitor | None = None
) -> list[Path]:
    """The checkpoints to delete, oldest first; a pure function of good checkpoints' manifests.

    Kept: the ``keep`` newest by (step, generation), the newest of each kind, and the ``keep_best``
    best by the metric ``best`` (the best one always; of equal ones the earlier). Entries with a
    problem are neither counted nor deleted. ``keep=None`` keeps all. ``OptionError`` for numbers
    below 1 or another mode.
    """
    checked_int(keep, "keep", or_none=True)
    checked_int(keep_best, "keep_best", at_least=0)
    if keep is None:
        return []
    good = sorted((e for e in entries if e.problem is None), key=lambda e: (e.step, e.generation))
    kept = {entry.path for entry in good[-keep:]}
    kept |= {entry.path for entry in {entry.kind: entry for entry in good}.values()}
    if best is not None:
        ranked = best.ranked(good, lambda entry: entry.metrics)
        kept |= {entry.path for entry in ranked[: max(1, keep_best)]}
    return [entry.path for entry in good if entry.path not in kept]


def apply_retention(
    store: Store,
    run_dir: Path,
    keep: int | None,
    keep_best: int = 1,
    best: Monitor | None = None,
    trusted: set[Path] | None = None,
) -> list[Path]:
    """Delete what :func:`to_delete` says; the paths deleted.

    Every byte of a checkpoint that is counted has been read back and found good, once: those in
    ``trusted`` before (add what this process wrote or loaded), the others now, and they are added.
    """
    if keep is None:
        return []
    known = set() if trusted is None else trusted
    entries = []
    for entry in scan(store, run_dir):
        if entry.problem is None and entry.path not in known:
            if verify(store, entry.path):
                continue
            known.add(entry.path)
        entries.append(entry)
    gone = to_delete(entries, keep, keep_best, best)
    for path in gone:
        # Out of the checkpoints' names first, durably, so that no half of one is ever taken for
        # whole.
        hidden = path.with_name(f"{DELETING}{path.name}-{secrets.token_hex(4)}")
        store.rename(path, hidden)
        store.sync_dir(path.parent)
        store.remove_tree(hidden)
        known.discard(path)
    return gone
