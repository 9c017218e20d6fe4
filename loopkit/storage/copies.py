"""Checkpoints and runs of a store on this machine, for whoever only reads them."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loopkit.checkpoint.format import CHECKPOINTS, MANIFEST, safe_name
from loopkit.checkpoint.run_dirs import holds_runs
from loopkit.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LoopkitWarning,
    NoValidCheckpointError,
)
from loopkit.run_file import COPY, RUN_FILE
from loopkit.storage.checkpoints import RemoteCheckpoints
from loopkit.storage.local_copy import staging_root
from loopkit.storage.owner import OWNER
from loopkit.storage.remote_files import Remote
from loopkit.storage.retries import Retries
from loopkit.storage.run_files import fetch_file, files_of_run
from loopkit.storage.urls import as_url, place_of

READ_PATIENCE = 30.0
"""Seconds that a reader waits for a store that fails all the time."""


def open_remote(url: str) -> Remote:
    """Return a place to read from."""
    return Remote(url, Retries(READ_PATIENCE))


@contextmanager
def _temporary_folder(prefix: str) -> Iterator[Path]:
    """Inside, there is a new folder beside the local copies of runs, on a disk that has room for them."""
    root = staging_root()
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as folder:
        yield Path(folder)


@contextmanager
def fetched(place: str | Path) -> Iterator[Path]:
    """Inside, a checkpoint of a store lies in a temporary folder. A path is returned as it is.

    Args:
        place: a path; or the URL of a checkpoint, or of a run for its newest valid one.

    Raises:
        CheckpointError: there is none, or it is corrupt.
        StorageError: the store does not answer.
    """
    place = place_of(place, "checkpoint")
    url = as_url(place)
    if url is None:
        yield Path(place)
        return
    with _temporary_folder(".fetched-") as folder:
        yield fetch_checkpoint(url, folder)[0]


def fetch_checkpoint(
    url: str, folder: Path, kind: str | None = None, option: str = ""
) -> tuple[Path, str]:
    """Download a checkpoint into ``folder``, and return its directory and its URL.

    Args:
        url: of a checkpoint, or of a run for its newest valid one.
        folder: an existing directory.
        kind: "full" or "weights": ignore other checkpoints of a run.
        option: how the user gave the URL, for messages.

    Raises:
        CheckpointError: there is no checkpoint, or it is corrupt.
        NoValidCheckpointError: the run holds none that is valid.
    """
    checkpoints, names = checkpoints_at(url, option)
    if [checkpoints.url(name) for name in names] == [url]:
        return checkpoints.fetch(names[0], folder), url
    problems = []
    for name in reversed(names):
        try:
            if kind and checkpoints.manifest(name).meta.get("kind", "full") != kind:
                continue
            path = checkpoints.fetch(name, folder)
        except CorruptCheckpointError as error:
            problems.append(f"{name}: {error}")
            continue
        for problem in problems:
            warnings.warn(
                f"corrupt checkpoint: {problem}. {name} is used.", LoopkitWarning, stacklevel=3
            )
        return path, checkpoints.url(name)
    listed = "".join(f"\n  {problem}" for problem in problems)
    raise NoValidCheckpointError(f"{option}{url} holds no valid checkpoint{listed}")


def remote_problems(url: str) -> dict[str, list[str]]:
    """Read every byte of a checkpoint, or of all those of a run, without keeping them.

    Returns:
        What is wrong, by the URL of the checkpoint.

    Raises:
        CheckpointError: there is no run and no checkpoint at the URL.
        FileNotFoundError: the run has no checkpoint.
    """
    checkpoints, names = checkpoints_at(url)
    if not names:
        raise FileNotFoundError(f"no checkpoint in {url}")
    return {checkpoints.url(name): checkpoints.problems(name) for name in names}


def _parent_of(remote: Remote) -> tuple[RemoteCheckpoints, list[str]]:
    """Return the folder that holds one checkpoint, as if there was no other, and its name."""
    parent, _, name = remote.url.rpartition("/")
    one = RemoteCheckpoints(open_remote(parent), below="")
    one.files = {name: remote.find()}
    return one, [name]


def checkpoints_at(url: str, option: str = "") -> tuple[RemoteCheckpoints, list[str]]:
    """Return the checkpoint at a URL, or those of the run there, and their names, oldest first.

    Args:
        url: of a checkpoint or a run.
        option: how the user gave it, for messages.

    Raises:
        CheckpointError: there is neither; the error names the runs below.
    """
    remote = open_remote(url)
    folders, files = remote.entries()
    if MANIFEST in files:
        return _parent_of(remote)
    if CHECKPOINTS not in folders and RUN_FILE not in files:
        runs = [each for each in folders if CHECKPOINTS in remote.below(each).entries()[0]]
        problem = holds_runs(url, [f"{url}/{each}" for each in runs])
        raise CheckpointError(f"{option}{problem or f'{url}: there is no such checkpoint or run'}")
    checkpoints = RemoteCheckpoints(remote).refresh()
    return checkpoints, checkpoints.names()


@contextmanager
def outlined(place: str | Path) -> Iterator[Path]:
    """Inside, a folder holds the runs at a URL or below it: all but the content of checkpoints.

    A file of a checkpoint has its size there, and takes no space. A path is returned as it is.

    Raises:
        CheckpointError: there is nothing at the URL.
        StorageError: the store does not answer.
    """
    url = as_url(place)
    if url is None:
        yield Path(place)
        return
    with _temporary_folder(".outline-") as folder:
        # Names of runs are made of the end of their paths.
        target = folder.joinpath(*filter(safe_name, url.split("/")[2:]))
        if not _outline(open_remote(url), target):
            raise CheckpointError(f"there is nothing at {url}")
        yield target


def _outline(remote: Remote, target: Path) -> bool:
    """Copy the outline of what is at ``remote``; return whether there is anything."""
    folders, files = remote.entries()
    target.mkdir(parents=True)
    if CHECKPOINTS not in folders and RUN_FILE not in files:
        for each in folders:
            if safe_name(each) and not each.startswith("."):
                _outline(remote.below(each), target / each)
        return bool(folders or files)
    for name, listed in files_of_run(remote).items():
        fetch_file(remote, name, listed, target)
    (target / COPY).write_text(f"{remote.url}\n")
    checkpoints = RemoteCheckpoints(remote).refresh()
    for name in checkpoints.names():
        for path, listed in checkpoints.files[name].items():
            if safe_name(path):
                file = target / CHECKPOINTS / name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                with open(file, "wb") as empty:
                    empty.truncate(listed.size)
        with suppress(CheckpointError):
            (target / CHECKPOINTS / name / MANIFEST).write_bytes(checkpoints.text(name))
    if OWNER in files and (target / RUN_FILE).exists():
        # The newest sign of life of the run.
        os.utime(target / RUN_FILE, (files[OWNER].modified, files[OWNER].modified))
    return True
