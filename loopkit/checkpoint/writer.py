"""Writing a checkpoint: staged, synced, checked, renamed; the last good one is never touched."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopkit.checkpoint import codecs, safetensors_io
from loopkit.checkpoint.format import (
    DELETING,
    LATEST,
    MANIFEST,
    MAX_EXTRA,
    MAX_JSON,
    STAGING,
    STATE,
    TENSORS,
    Snapshot,
    checkpoints_dir,
    dump_json,
    parse_name,
    safe_name,
    step_name,
)
from loopkit.checkpoint.manifest import (
    Chunk,
    FileRecord,
    Manifest,
    TensorRecord,
    check_coverage,
    meta_json,
)
from loopkit.checkpoint.store import Store
from loopkit.errors import CheckpointError, LoopkitError

_OWNER = re.compile(r"\.staging-(?P<host>[\w.]+)-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]+")


@dataclass
class PendingCheckpoint:
    """A snapshot ready to be written: its state as JSON, all its tensors by file prefix."""

    tensors: dict[str, dict[str, Any]]
    state: bytes
    meta: dict[str, object]
    files: dict[str, bytes] = field(default_factory=dict)


def draft(snapshot: Snapshot) -> PendingCheckpoint:
    """Encode the state; its tensors join those of the prefix "state". Tensors are not copied.

    ``TypeError`` naming the path of a value or tensor that cannot be saved, ``ValueError`` for a
    bad name.
    """
    tensors = {prefix: dict(named) for prefix, named in snapshot.tensors.items()}
    kept = tensors.setdefault("state", {})
    state = dump_json(codecs.encode(snapshot.state, "", kept), sort=False)
    if len(state) > MAX_JSON:
        raise ValueError(f"{STATE} would have {len(state)} bytes; keep large values in tensors")
    for prefix, named in tensors.items():
        if not safe_name(prefix) or "/" in prefix:
            raise ValueError(f"{prefix!r} cannot be the name of a file")
        for name, tensor in named.items():
            safetensors_io.check(f"{prefix} tensor {name!r}", tensor)
    tensors = {prefix: named for prefix, named in tensors.items() if named}
    meta_json(snapshot.meta)
    taken = {MANIFEST, STATE, *(prefix + TENSORS for prefix in tensors)}
    for name in snapshot.files:
        if not safe_name(name) or name in taken:
            raise ValueError(f"{name!r} cannot be the name of an extra file")
        if len(snapshot.files[name]) > MAX_EXTRA:
            raise ValueError(f"{name!r} has more than {MAX_EXTRA} bytes")
    return PendingCheckpoint(tensors, state, dict(snapshot.meta), dict(snapshot.files))


def write(store: Store, run_dir: Path, snapshot: Snapshot | PendingCheckpoint) -> Path:
    """Save one checkpoint under ``run_dir`` and return its directory, durable.

    On any failure the staging directory is removed, what was saved before is intact, and the error
    of :func:`draft` or of the store is raised (``DiskFullError``, ``RunDirError``,
    ``CheckpointError``). A step that is already there gets the next generation.
    """
    ready = snapshot if isinstance(snapshot, PendingCheckpoint) else draft(snapshot)
    parent = checkpoints_dir(run_dir)
    if store.mkdir(parent):
        store.sync_dir(parent.parent)
    staging = parent / staging_name()
    with removed_on_error(store, staging):
        store.mkdir(staging)
        manifest = write_files(store, staging, ready)
        final, digest = publish(store, staging, manifest)
    point_latest(store, final, manifest, digest)
    return final


@contextmanager
def removed_on_error(store: Store, staging: Path) -> Iterator[None]:
    """Inside, ``staging`` is written; whatever is raised, it is removed first."""
    try:
        yield
    except BaseException:
        with suppress(LoopkitError, OSError):
            store.remove_tree(staging)
        raise


def publish(store: Store, staging: Path, manifest: Manifest) -> tuple[Path, str]:
    """Give a staged checkpoint its manifest and its name, durably; the directory and the manifest's
    SHA-256.
    """
    parent = staging.parent
    manifest.generation = _next_generation(store, parent, manifest)
    final = parent / step_name(manifest.meta["step"], manifest.generation)
    return final, _commit(store, staging, final, manifest)


def write_files(store: Store, staging: Path, ready: PendingCheckpoint) -> Manifest:
    """Write everything but the manifest, which is returned."""
    manifest = Manifest(dict(ready.meta), 1, {}, {}, {})
    for prefix, named in ready.tensors.items():
        name = prefix + TENSORS
        aliases = safetensors_io.find_aliases(named)
        written = {key: tensor for key, tensor in named.items() if key not in aliases}
        with store.create(staging / name, safetensors_io.data_size(written)) as sink:
            # As safetensors' own save_model notes them, so that its load_model finds tied weights
            # too.
            specs = safetensors_io.write(sink, written, aliases)
        manifest.files[name] = FileRecord(name, sink.size, sink.sha256)
        manifest.tensors[prefix] = {
            key: TensorRecord(
                s.dtype, s.shape, (Chunk(name, (0,) * len(s.shape), s.shape, s.crc32),)
            )
            for key, s in specs.items()
        }
        manifest.aliases.update({prefix: aliases} if aliases else {})
    for name, data in {STATE: ready.state, **ready.files}.items():
        sink = store.write_below(staging, name, data)
        manifest.files[name] = FileRecord(name, sink.size, sink.sha256)
    return manifest


def _next_generation(store: Store, parent: Path, manifest: Manifest) -> int:
    found = [parse_name(name) for name in store.names(parent)]
    return 1 + max(
        (item[1] for item in found if item and item[0] == manifest.meta["step"]), default=0
    )


def _commit(store: Store, staging: Path, final: Path, manifest: Manifest) -> str:
    try:
        check_coverage(manifest)
    except ValueError as error:
        raise CheckpointError(f"not saved: {error}") from None
    sink = store.write_bytes(staging / MANIFEST, manifest.dump())
    store.sync_dir(staging)
    store.rename(staging, final)
    store.sync_dir(final.parent)
    return sink.sha256


def point_latest(store: Store, final: Path, manifest: Manifest, digest: str) -> None:
    """Name the newest checkpoint in ``latest``, replaced at once."""
    body = {
        "dir": final.name,
        "step": manifest.meta["step"],
        "generation": manifest.generation,
        "sha256": digest,
    }
    parent = final.parent
    fresh = parent / staging_name()
    try:
        store.write_bytes(fresh, dump_json(body))
        store.rename(fresh, parent / LATEST)
        store.sync_dir(parent)
    except BaseException:
        with suppress(LoopkitError, OSError):
            store.remove(fresh)
        raise


def clean(store: Store, run_dir: Path) -> list[str]:
    """Remove what writers that are gone left behind; the names removed.

    Call it with the run's lock held. What a live process of this machine is writing stays.
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


def staging_name() -> str:
    """A new name for a staging directory, which tells whose it is."""
    pid = os.getpid()
    return f"{STAGING}{_host()}-{pid}-{_started(pid)}-{secrets.token_hex(4)}"


def _started(pid: int) -> int:
    """Clock ticks from boot to the start of a process; 0 where the system does not say or it is
    gone.
    """
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
    return _is_running(pid) and _started(pid) == int(match["start"])


def _is_running(pid: int) -> bool:
    if sys.platform == "win32":
        return _is_running_on_windows(pid)
    try:
        os.kill(pid, 0)
    except PermissionError:
        pass
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
