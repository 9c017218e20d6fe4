"""Finding a run's checkpoints: the newest good one is used, a corrupt one is set aside, loudly."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopkit.checkpoint.format import (
    LATEST,
    Snapshot,
    aside_name,
    checkpoints_dir,
    is_quarantined,
    load_json,
    parse_name,
)
from loopkit.checkpoint.manifest import Manifest
from loopkit.checkpoint.reader import check_sizes, read, read_manifest, verify
from loopkit.checkpoint.store import Store
from loopkit.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LoopkitWarning,
    NoGoodCheckpointError,
    OptionError,
    RunDirError,
)

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A checkpoint found in a run directory; ``manifest`` is ``None`` when ``problem`` says what is
    wrong.
    """

    path: Path
    step: int
    generation: int
    manifest: Manifest | None
    problem: str | None = None

    @property
    def kind(self) -> str:
        """ "full" or "weights"."""
        return str(self.manifest.meta.get("kind", "full")) if self.manifest else "unknown"

    @property
    def size(self) -> int:
        """Bytes of all its files, MANIFEST.json among them."""
        return 0 if self.manifest is None else self.manifest.size

    @property
    def epoch(self) -> Any:
        """What the manifest notes as the epoch."""
        return self.manifest.meta.get("epoch") if self.manifest else None

    @property
    def metrics(self) -> dict[str, float]:
        """What the manifest notes of metrics at this step."""
        found = self.manifest.meta.get("metrics") if self.manifest else None
        return found if isinstance(found, dict) else {}


def scan(store: Store, run_dir: Path, deep: bool = False) -> list[Entry]:
    """The checkpoints of a run, oldest first by (step, generation); quarantined ones are not among
    them.

    Looks at manifests and file sizes; with ``deep`` at every byte. Too new ones have a ``problem``
    too.
    """
    parent = checkpoints_dir(run_dir)
    found = sorted((key, name) for name in store.names(parent) if (key := parse_name(name)))
    return [_entry(store, parent / name, key, deep) for key, name in found]


def _entry(store: Store, path: Path, key: tuple[int, int], deep: bool) -> Entry:
    try:
        if not store.is_dir(path):
            raise CorruptCheckpointError(f"{path} is not a directory")
        manifest = read_manifest(store, path)
        check_sizes(store, path, manifest)
        problems = verify(store, path) if deep else []
    except CheckpointError as error:
        return Entry(path, *key, None, str(error))
    return (
        Entry(path, *key, manifest, "; ".join(problems))
        if problems
        else Entry(path, *key, manifest)
    )


def newest_valid(
    store: Store,
    run_dir: Path,
    warn: Warn | None = None,
    quarantine: bool = True,
    kind: str | None = None,
) -> Path | None:
    """The newest checkpoint, by (step, generation), of which every byte is as written; ``None``
    without any.

    A corrupt one is renamed to ``step-….corrupt-N``, never deleted, and named through ``warn`` (by
    default a ``LoopkitWarning``); ``quarantine=False`` leaves its name. ``kind`` passes over
    checkpoints of another kind. Raises ``NoGoodCheckpointError`` listing each with its reason when
    there are some and none is good (they keep their names then), ``CheckpointError`` for one that
    is too new or cannot be read.
    """
    found = _newest(store, run_dir, warn or _warn, quarantine, kind, load=False)
    return found[0] if found else None


def load_newest(
    store: Store,
    run_dir: Path,
    warn: Warn | None = None,
    quarantine: bool = True,
    kind: str | None = None,
) -> tuple[Path, Snapshot] | None:
    """As :func:`newest_valid`, together with what it holds, read only once."""
    found = _newest(store, run_dir, warn or _warn, quarantine, kind, load=True)
    return (found[0], found[1]) if found and found[1] is not None else None


def detach_after(store: Store, run_dir: Path, since: Path) -> list[Path]:
    """Rename the checkpoints newer than ``since`` to ``step-….left-N``; their new paths, newest
    first.

    For a run that goes on from an older checkpoint of its own: what it leaves would otherwise be
    found as the newest one at the next start. ``OptionError`` when ``since`` is no checkpoint of
    this run.
    """
    parent = checkpoints_dir(run_dir)
    key, names = parse_name(since.name), store.names(parent)
    if key is None or since.name not in names or since.parent.resolve() != parent.resolve():
        raise OptionError(f"{since} is no checkpoint of {run_dir}")
    newer = sorted(
        ((found, name) for name in names if (found := parse_name(name)) and found > key),
        reverse=True,
    )
    left = []
    for _, name in newer:
        left.append(parent / aside_name(name, "left", names))
        store.rename(parent / name, left[-1])
    if left:
        store.sync_dir(parent)
    return left


def _warn(text: str) -> None:
    warnings.warn(text, LoopkitWarning, stacklevel=4)


def _newest(
    store: Store, run_dir: Path, warn: Warn, quarantine: bool, kind: str | None, load: bool
) -> tuple[Path, Snapshot | None] | None:
    parent = checkpoints_dir(run_dir)
    names = store.names(parent)
    _check_latest(store, parent, names, warn)
    bad: list[tuple[Path, str]] = []
    for _, name in sorted(
        ((key, name) for name in names if (key := parse_name(name))), reverse=True
    ):
        path = parent / name
        try:
            if kind is not None and Entry(path, 0, 0, read_manifest(store, path)).kind != kind:
                continue
            snapshot = _good(store, path, load)
        except CorruptCheckpointError as error:
            bad.append((path, str(error)))
            continue
        for bad_path, reason in bad:
            _set_aside(store, bad_path, reason, path, warn, quarantine)
        return path, snapshot
    bad += [(parent / name, "set aside before") for name in names if is_quarantined(name)]
    if bad:
        listed = "\n".join(f"  {path.name}: {reason}" for path, reason in bad)
        raise NoGoodCheckpointError(
            f"none of the checkpoints in {parent} can be trusted:\n{listed}\n"
            "Move them away to start anew, or name one to resume from."
        )
    return None


def _good(store: Store, path: Path, load: bool) -> Snapshot | None:
    if not store.is_dir(path):
        raise CorruptCheckpointError(f"{path} is not a directory")
    if load:
        return read(store, path)
    problems = verify(store, path)
    if problems:
        raise CorruptCheckpointError("; ".join(problems))
    return None


def _set_aside(
    store: Store, path: Path, reason: str, instead: Path, warn: Warn, quarantine: bool
) -> None:
    kept = path
    if quarantine:
        kept = path.with_name(aside_name(path.name, "corrupt", store.names(path.parent)))
        try:
            store.rename(path, kept)
            store.sync_dir(path.parent)
        except RunDirError:
            # A run that can only be read can still be resumed elsewhere.
            kept = path
    warn(f"corrupt checkpoint: {reason}. It is kept as {kept.name}; {instead.name} is used.")


def _check_latest(store: Store, parent: Path, names: list[str], warn: Warn) -> None:
    """``latest`` is a hint for people and other programs; one that is damaged is named and not
    used.
    """
    if LATEST not in names:
        return
    try:
        hint: Any = load_json(store.read_bytes(parent, LATEST, 1 << 16), str(parent / LATEST))
        key = parse_name(hint["dir"])
        if key is None:
            raise ValueError("it names no checkpoint")
    except (CheckpointError, FileNotFoundError, TypeError, KeyError, ValueError) as error:
        warn(f"{parent / LATEST} is damaged and ignored: {error}")
        return
    there = [found for name in names if (found := parse_name(name.partition(".")[0]))]
    if key > max(there, default=(-1, 0)):
        warn(
            f"{parent / LATEST} names {hint['dir']}, which is not there; an older checkpoint is "
            f"used, if any."
        )


def load_snapshot(path: Path, store: Store | None = None) -> Snapshot:
    """The verified content of a checkpoint directory, or of a run directory's newest good
    checkpoint.

    Raises:
        CheckpointError: there is none, or it cannot be trusted.
    """
    store = store or Store()
    if checkpoints_dir(path).is_dir():
        # Without quarantine: this may be another run's directory, and that run may be alive.
        found = load_newest(store, path, quarantine=False)
        if found is None:
            raise NoGoodCheckpointError(f"the run directory {path} holds no checkpoint")
        return found[1]
    if not path.is_dir():
        raise CheckpointError(f"{path} is no checkpoint: there is no such directory")
    return read(store, path)
