"""Finding a run's checkpoints: the newest valid one is used, and a corrupt one is renamed with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopkit.checkpoint.format import (
    LATEST,
    MANIFEST,
    STATE,
    TENSORS,
    aside_name,
    checkpoints_dir,
    is_quarantined,
    load_json,
    parse_name,
)
from loopkit.checkpoint.manifest import Manifest
from loopkit.checkpoint.reader import (
    check_sizes,
    read_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from loopkit.checkpoint.run_dirs import no_run_in
from loopkit.checkpoint.snapshot import Snapshot
from loopkit.checkpoint.store import Store
from loopkit.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LoopkitWarning,
    NoValidCheckpointError,
    OptionError,
    RunDirError,
)

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """A checkpoint in a run directory.

    Attributes:
        manifest: None if the checkpoint has a problem.
        problem: what is wrong with it; None if nothing is.
    """

    path: Path
    step: int
    generation: int
    manifest: Manifest | None
    problem: str | None = None

    @property
    def kind(self) -> str:
        """ "full", "weights", or "unknown" without a manifest."""
        return str(self.manifest.meta.get("kind", "full")) if self.manifest else "unknown"

    @property
    def size(self) -> int:
        """The bytes of all its files, MANIFEST.json among them."""
        return 0 if self.manifest is None else self.manifest.size

    @property
    def epoch(self) -> Any:
        """The epoch that the manifest records."""
        return self.manifest.meta.get("epoch") if self.manifest else None

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics that the manifest records for this step."""
        found = self.manifest.meta.get("metrics") if self.manifest else None
        return found if isinstance(found, dict) else {}


def scan(store: Store, run_dir: Path, deep: bool = False) -> list[Entry]:
    """List the checkpoints of a run, oldest first by (step, generation), without quarantined ones.

    Args:
        deep: read every byte; otherwise only manifests and file sizes. A checkpoint that a newer
            loopkit wrote has a ``problem`` either way.
    """
    parent = checkpoints_dir(run_dir)
    found = sorted((key, name) for name in store.names(parent) if (key := parse_name(name)))
    return [_entry(store, parent / name, key, deep) for key, name in found]


def has_checkpoints(run_dir: Path, store: Store | None = None) -> bool:
    """Return whether a run directory holds a checkpoint of any kind, corrupt ones among them."""
    names = (store or Store()).names(checkpoints_dir(run_dir))
    return any(parse_name(name) or is_quarantined(name) for name in names)


def _entry(store: Store, path: Path, key: tuple[int, int], deep: bool) -> Entry:
    try:
        if not store.is_dir(path):
            raise CorruptCheckpointError(f"{path} is not a directory")
        manifest = read_manifest(store, path)
        check_sizes(store, path, manifest)
        problems = verify_checkpoint(store, path) if deep else []
    except CheckpointError as error:
        return Entry(path, *key, None, str(error))
    return Entry(path, *key, manifest, "; ".join(problems) or None)


def resolve_checkpoint(
    path: Path, store: Store | None = None, *, kind: str | None = None, option: str = ""
) -> Path:
    """Return the checkpoint that a path names: itself, or the newest valid one of a run directory.

    Nothing is renamed in the run directory, because it may belong to a run that is alive.

    Args:
        kind: "full" or "weights": ignore other checkpoints of a run directory.
        option: how the user gave the path, for messages, such as "--checkpoint ".

    Raises:
        CheckpointError: there is no such directory, or a newer loopkit wrote the checkpoint.
        NoValidCheckpointError: the run directory holds none, or all of them are corrupt.
    """
    return _resolve(path, store or Store(), kind, option, load=False)[0]


def load_checkpoint(
    path: Path, store: Store | None = None, *, kind: str | None = None, option: str = ""
) -> tuple[Path, Snapshot]:
    """Find a checkpoint as :func:`resolve_checkpoint` does; return its directory and its content.

    Raises:
        CheckpointError: as :func:`resolve_checkpoint`, or the checkpoint is corrupt.
    """
    found, snapshot = _resolve(path, store or Store(), kind, option, load=True)
    assert snapshot is not None
    return found, snapshot


def load_snapshot(path: Path, store: Store | None = None) -> Snapshot:
    """Return the verified content of a checkpoint, or of a run directory's newest valid one.

    Raises:
        CheckpointError: there is none, or it cannot be trusted.
    """
    return load_checkpoint(path, store)[1]


def _resolve(
    path: Path, store: Store, kind: str | None, option: str, *, load: bool
) -> tuple[Path, Snapshot | None]:
    if checkpoints_dir(path).is_dir():
        found = _newest(store, path, _warn, quarantine=False, kind=kind, load=load)
        if found is None:
            raise NoValidCheckpointError(f"{option}{path}: the run directory holds no checkpoint")
        return found
    if not path.is_dir():
        raise CheckpointError(f"{option}{path}: there is no such checkpoint or run directory")
    if problem := no_run_in(path):
        raise CheckpointError(f"{option}{problem}")
    weights = path / f"model{TENSORS}"
    if weights.exists() and not (path / MANIFEST).exists() and not (path / STATE).exists():
        raise CheckpointError(
            f"{option}{path} is an export, which has weights and no state of a run: load them with "
            f"safetensors.torch.load_file({str(weights)!r}), or name the run or a checkpoint"
        )
    return path, read_checkpoint(store, path) if load else None


def newest_valid(
    store: Store,
    run_dir: Path,
    warn: Warn | None = None,
    quarantine: bool = True,
    kind: str | None = None,
) -> Path | None:
    """Return the newest checkpoint whose every byte verifies; None if there is no checkpoint.

    Args:
        warn: gets a sentence about each corrupt checkpoint; None issues a ``LoopkitWarning``.
        quarantine: rename a corrupt checkpoint to ``step-….corrupt-N``. None is ever deleted.
        kind: ignore checkpoints of another kind.

    Raises:
        NoValidCheckpointError: there are checkpoints and none is valid. Lists each with its reason;
            none is renamed.
        CheckpointError: a checkpoint cannot be read, or a newer loopkit wrote it.
    """
    found = _newest(store, run_dir, warn or _warn, quarantine=quarantine, kind=kind, load=False)
    return found[0] if found else None


def load_newest(
    store: Store,
    run_dir: Path,
    warn: Warn | None = None,
    quarantine: bool = True,
    kind: str | None = None,
) -> tuple[Path, Snapshot] | None:
    """Find the checkpoint that :func:`newest_valid` finds and return it with its content.

    It is read only once.
    """
    found = _newest(store, run_dir, warn or _warn, quarantine=quarantine, kind=kind, load=True)
    return (found[0], found[1]) if found and found[1] is not None else None


def detach_after(store: Store, run_dir: Path, since: Path) -> list[Path]:
    """Rename the checkpoints newer than ``since`` to ``step-….left-N``; return them, newest first.

    A run that resumes from an older checkpoint of its own does not continue from the later ones.
    The next start would otherwise take one of them for the newest.

    Raises:
        OptionError: ``since`` is no checkpoint of this run.
    """
    parent = checkpoints_dir(run_dir)
    key, names = parse_name(since.name), store.names(parent)
    if key is None or since.name not in names or since.parent.resolve() != parent.resolve():
        raise OptionError(f"{since} is no checkpoint of {run_dir}")
    newer = sorted(
        ((found, name) for name in names if (found := parse_name(name)) and found > key),
        reverse=True,
    )
    detached = []
    for _, name in newer:
        detached.append(parent / aside_name(name, "left", names))
        store.rename(parent / name, detached[-1])
    # Even without a rename: a process that was killed may have left ``since`` itself not durable.
    store.sync_dir(parent)
    return detached


def _warn(text: str) -> None:
    warnings.warn(text, LoopkitWarning, stacklevel=4)


def _newest(
    store: Store, run_dir: Path, warn: Warn, *, quarantine: bool, kind: str | None, load: bool
) -> tuple[Path, Snapshot | None] | None:
    """Return the newest valid checkpoint, with its content if ``load``; None if there is none."""
    parent = checkpoints_dir(run_dir)
    names = store.names(parent)
    _check_latest(store, parent, names, warn)
    corrupt: list[tuple[Path, str]] = []
    for _, name in sorted(
        ((key, name) for name in names if (key := parse_name(name))), reverse=True
    ):
        path = parent / name
        try:
            if kind is not None and Entry(path, 0, 0, read_manifest(store, path)).kind != kind:
                continue
            snapshot = _verified(store, path, load)
        except CorruptCheckpointError as error:
            corrupt.append((path, str(error)))
            continue
        for corrupt_path, reason in corrupt:
            kept = _quarantine(store, corrupt_path) if quarantine else corrupt_path
            warn(f"corrupt checkpoint: {reason}. It is kept as {kept.name}; {name} is used.")
        return path, snapshot
    corrupt += [(parent / name, "quarantined before") for name in names if is_quarantined(name)]
    if corrupt:
        listed = "\n".join(f"  {path.name}: {reason}" for path, reason in corrupt)
        raise NoValidCheckpointError(
            f"none of the checkpoints in {parent} can be trusted:\n{listed}\n"
            "Move them away to start again, or name one to resume from."
        )
    return None


def _verified(store: Store, path: Path, load: bool) -> Snapshot | None:
    """Read a checkpoint, or only verify it. Raises ``CorruptCheckpointError``."""
    if not store.is_dir(path):
        raise CorruptCheckpointError(f"{path} is not a directory")
    if load:
        return read_checkpoint(store, path)
    problems = verify_checkpoint(store, path)
    if problems:
        raise CorruptCheckpointError("; ".join(problems))
    return None


def _quarantine(store: Store, path: Path) -> Path:
    """Rename a corrupt checkpoint and return its new path, or the old one if that is not allowed."""
    kept = path.with_name(aside_name(path.name, "corrupt", store.names(path.parent)))
    try:
        store.rename(path, kept)
        store.sync_dir(path.parent)
    except RunDirError:
        # A run directory that can only be read can still be resumed from into another one.
        return path
    return kept


def _check_latest(store: Store, parent: Path, names: list[str], warn: Warn) -> None:
    """Warn of a file ``latest`` that is damaged. It is a hint for people, and is never used."""
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
    present = [found for name in names if (found := parse_name(name.partition(".")[0]))]
    if key > max(present, default=(-1, 0)):
        warn(
            f"{parent / LATEST} names {hint['dir']}, which is not there; "
            "an older checkpoint is used, if there is one."
        )
