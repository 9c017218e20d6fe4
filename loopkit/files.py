"""Files that are replaced in one piece: a reader, or a crash, sees the old file or the new one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path with the same suffix; the file written there then replaces ``path``.

    If the block raises, the temporary file is removed and ``path`` stays as it was.

    Args:
        durable: wait until the content is on the disk before it replaces ``path``.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_file(path: Path, parts: Iterable[bytes], *, durable: bool = False) -> None:
    """Write ``parts`` one after another into ``path``, and replace it in one piece."""
    with replacing(path, durable=durable) as temporary, open(temporary, "wb") as file:
        file.writelines(parts)


def sync_entry(directory: Path) -> None:
    """Make the entry of a directory durable, and those of the directories above on its file system.

    Stops where this user may not write: what lies above cannot be new.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    device = directory.stat().st_dev
    for folder in directory.absolute().parents:
        if folder.stat().st_dev != device or not os.access(folder, os.R_OK | os.W_OK):
            return
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with suppress(OSError):  # some network file systems cannot sync a directory
                os.fsync(handle)
        finally:
            os.close(handle)


def link_tree(source: Path, target: Path) -> None:
    """Make ``target`` a copy of a directory: of hard links, or of files where there are no links.

    It stays whole if ``source`` is deleted afterwards.
    """
    shutil.copytree(source, target, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # no links here, or another file system
        shutil.copyfile(source, target)


def rename_aside(path: Path) -> None:
    """Free the name ``path``: a file that has it gets a number, such as ``metrics.1.jsonl``."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
