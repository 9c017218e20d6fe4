"""The local copy of a run in a store: where it lies, and whether it belongs to what the store holds."""

from __future__ import annotations

import json
import os
import shutil
import urllib.parse
from contextlib import suppress
from pathlib import Path
from typing import Any

from loopkit.checkpoint import LOCK
from loopkit.checkpoint.format import CHECKPOINTS
from loopkit.files import write_file

STAGING_VARIABLE = "LOOPKIT_STAGING"
FETCHED = ".fetched"
"""A folder of the local copy: a checkpoint of another run, until this run has read it."""
_RECORD = ".store.json"


def staging_root() -> Path:
    """Return the folder of all local copies: ``$LOOPKIT_STAGING``, or one in the user's cache."""
    given = os.environ.get(STAGING_VARIABLE)
    if given:
        return Path(given).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "loopkit" / "runs"


def local_copy_of(url: str) -> Path:
    """Return where the local copy of a run lies, such as ``~/.cache/loopkit/runs/s3/bucket/a``."""
    scheme, _, rest = url.partition("://")
    parts = [urllib.parse.quote(part, safe=" =+@,") for part in rest.split("/") if part]
    return staging_root().joinpath(scheme, *(f"%{p}" if p in (".", "..") else p for p in parts))


def known_owners(local: Path) -> list[str]:
    """Return the ids of the last starts in this local copy, as ``note_owner`` noted them."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        about: dict[str, Any] = json.loads((local / _RECORD).read_text(encoding="utf-8"))
        return [str(each) for each in about["owners"]]
    return []


def note_owner(local: Path, url: str, owners: list[str]) -> None:
    """Note whose work lies in this local copy. The next start here compares it with the store."""
    text = json.dumps({"url": url, "owners": owners[-2:]})
    write_file(local / _RECORD, [text.encode()], durable=True)


def mirrored_files(local: Path) -> dict[str, tuple[int, int]]:
    """Return the files of a run besides its checkpoints: size and time of change, by name.

    Hidden files, links and temporary files are left out.
    """
    found: dict[str, tuple[int, int]] = {}
    for folder, inner, names in os.walk(local):
        inner[:] = [n for n in inner if not n.startswith(".")]
        if Path(folder) == local and CHECKPOINTS in inner:
            inner.remove(CHECKPOINTS)
        for name in names:
            path = Path(folder, name)
            with suppress(FileNotFoundError):
                if name != LOCK and not name.startswith(".") and not path.is_symlink():
                    state = path.stat()
                    found[path.relative_to(local).as_posix()] = state.st_size, state.st_mtime_ns
    return found


def remove_fetched(local: Path) -> None:
    """Delete the checkpoint of another run that this run has started from."""
    shutil.rmtree(local / FETCHED, ignore_errors=True)
