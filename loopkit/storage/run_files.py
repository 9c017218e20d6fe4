"""The files of a run in a store besides its checkpoints: logs, run.json and what hooks wrote."""

from __future__ import annotations

import os
from pathlib import Path

from loopkit.checkpoint.format import CHECKPOINTS, safe_name
from loopkit.files import write_file
from loopkit.storage.remote_files import Listed, Remote


def files_of_run(remote: Remote) -> dict[str, Listed]:
    """Return the files that are no part of a checkpoint, by name. Hidden ones are left out."""
    folders, found = remote.entries()
    for folder in folders:
        if folder != CHECKPOINTS and not folder.startswith("."):
            inside = remote.find(folder)
            found |= {f"{folder}/{name}": listed for name, listed in inside.items()}
    return {
        name: listed
        for name, listed in found.items()
        if safe_name(name) and not any(part.startswith(".") for part in name.split("/"))
    }


def fetch_file(remote: Remote, name: str, listed: Listed, folder: Path) -> None:
    """Download a file, which appears whole or not at all, with the time of its last change."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, remote.pieces(name, listed.size))
    os.utime(target, (listed.modified, listed.modified))
