"""Store: all file operations of checkpoints. Tests count, fail or kill at any of them in ``_op``."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopkit.checkpoint.digests import Digest
from loopkit.checkpoint.format import safe_name
from loopkit.checkpoint.streams import FileReader, FileWriter
from loopkit.errors import (
    CheckpointError,
    CorruptCheckpointError,
    DiskFullError,
    LoopkitWarning,
    RunDirError,
)

_FULL = {errno.ENOSPC, errno.EFBIG, *([errno.EDQUOT] if hasattr(errno, "EDQUOT") else [])}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK}


def _flags(*names: str) -> int:
    """Return the named flags of ``os.open``; those that this system does not have count as 0."""
    return sum(getattr(os, name, 0) for name in names)


_DIRECTORY = _flags("O_RDONLY", "O_DIRECTORY", "O_CLOEXEC")
# O_NONBLOCK: a named pipe put in a file's place must not block the reader.
_READ = _flags("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT")
_CREATE = _flags(
    "O_WRONLY", "O_CREAT", "O_EXCL", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT"
)
# Windows syncs a file only by a handle that may write.
_SYNC = _flags("O_RDWR", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT")
_LOCK = _flags("O_RDWR", "O_CREAT", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY", "O_NOINHERIT")


class Store:
    """File operations that are durable where they promise it, and name the path when they fail.

    Writing raises ``DiskFullError`` (no space, quota, file size limit), ``RunDirError`` (not
    permitted, read-only, the directory vanished) or ``CheckpointError``. Reading raises
    ``FileNotFoundError`` for a missing file, ``CorruptCheckpointError`` for anything that is not a
    regular file inside its directory, and ``CheckpointError`` otherwise.

    Args:
        maps: leave the verified tensors of the model and the optimizer in their files, memory
            mapped, for callers who need only parts of them. A tensor that lies in several pieces is
            returned as a :class:`~loopkit.checkpoint.snapshot.ShardedTensor`.
        partial: a shard that is missing is one that another machine keeps on its own disk.
    """

    maps = False
    partial = False

    def __init__(self, *, maps: bool = False, partial: bool = False) -> None:
        self.maps = maps
        self.partial = partial

    def _op(self, kind: str, path: Path, extra: Any = None) -> None:
        """Hook for tests, called before each operation.

        ``extra`` is the target of a rename, or the bytes of a write.
        """

    def mkdir(self, path: Path) -> bool:
        """Make one directory. Return False if it existed already."""
        with self._writing("mkdir", path):
            try:
                os.mkdir(path)
            except FileExistsError:
                return False
            return True

    def create(self, path: Path, size: int | None = None) -> FileWriter:
        """Create a file that must not exist. ``size`` (expected bytes) only serves error messages."""
        with self._writing("create", path, wanted=size):
            return FileWriter(self._writing, path, os.open(path, _CREATE, 0o666), size)

    def write_bytes(self, path: Path, data: bytes) -> FileWriter:
        """Write a new durable file. Return its closed writer, which has the size and the digest."""
        with self.create(path, len(data)) as file:
            file.write(data)
        return file

    def open(self, directory: Path, name: str, digest: Digest | None = None) -> FileReader:
        """Open a file below ``directory`` for reading; no symbolic link below it is followed.

        What is read goes into ``digest`` if it is given.
        """
        if not safe_name(name):
            raise CorruptCheckpointError(
                f"{directory}: {name!a} is not a name inside the checkpoint"
            )
        path = directory / name
        with self._reading("open", path):
            return FileReader(self._reading, path, _open_below(directory, name), digest)

    def read_bytes(self, directory: Path, name: str, limit: int) -> bytes:
        """Return the content of a file.

        Raises:
            CorruptCheckpointError: it has more than ``limit`` bytes.
        """
        with self.open(directory, name) as file:
            if file.size > limit:
                raise CorruptCheckpointError(f"{file.path}: {file.size} bytes, more than {limit}")
            return file.read_all()

    def rename(self, path: Path, target: Path) -> None:
        """Move within one file system; a file at the target is replaced atomically."""
        with self._writing("rename", path, extra=target):
            os.replace(path, target)

    def sync_dir(self, path: Path) -> None:
        """Make the entries of a directory durable. On Windows the file system does so by itself."""
        with self._writing("sync_dir", path):
            if not hasattr(os, "O_DIRECTORY"):
                return
            handle = os.open(path, _DIRECTORY)
            try:
                os.fsync(handle)
            except OSError as error:
                # Some network file systems cannot sync a directory, and keep its entries safe.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
            finally:
                os.close(handle)

    def sync_file(self, path: Path) -> None:
        """Make the content of a file durable that another part of the program writes, if it exists."""
        with self._writing("sync", path):
            try:
                handle = os.open(path, _SYNC)
            except FileNotFoundError:
                return
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def names(self, path: Path) -> list[str]:
        """Return the sorted entries of a directory; an empty list if it does not exist."""
        with self._reading("names", path):
            try:
                return sorted(os.listdir(path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def is_dir(self, path: Path, follow: bool = False) -> bool:
        """Return whether ``path`` is a directory; a link to a directory counts only with ``follow``."""
        with self._reading("stat", path):
            try:
                return stat.S_ISDIR(os.stat(path, follow_symlinks=follow).st_mode)
            except FileNotFoundError:
                return False

    def remove(self, path: Path) -> None:
        """Delete a file or a symbolic link, if it exists."""
        with self._writing("remove", path):
            try:
                os.unlink(path)
            except FileNotFoundError:
                return

    def remove_tree(self, path: Path) -> None:
        """Delete a directory with its content, or a file; links are deleted, not followed."""
        if not self.is_dir(path):
            self.remove(path)
            return
        for name in self.names(path):
            self.remove_tree(path / name)
        with self._writing("rmdir", path):
            os.rmdir(path)

    def lock(self, path: Path, content: bytes) -> int | None:
        """Lock ``path``, write ``content`` into it and return the handle; None if it is locked.

        The operating system releases the lock when the last process that has the handle ends.
        """
        with self._writing("lock", path):
            handle = os.open(path, _LOCK, 0o666)
            try:
                if not _locked(handle, path):
                    os.close(handle)
                    return None
                os.ftruncate(handle, 0)
                # Windows locks the first byte against readers too, so the content begins after it.
                os.write(handle, b" " + content)
            except BaseException:
                os.close(handle)
                raise
            return handle

    def lock_content(self, path: Path, limit: int) -> bytes:
        """Return at most ``limit`` bytes of the content that the holder of a lock wrote."""
        with self._reading("open", path):
            handle = _open_below(path.parent, path.name)
            try:
                os.lseek(handle, 1, os.SEEK_SET)
                return os.read(handle, limit)
            finally:
                os.close(handle)

    def unlock(self, handle: int, clear: bool = True) -> None:
        """Close a handle of :meth:`lock`: the lock ends unless another process has the handle."""
        if clear:
            os.ftruncate(handle, 0)
        os.close(handle)

    @contextmanager
    def _writing(
        self, kind: str, path: Path, extra: Any = None, wanted: int | None = None
    ) -> Iterator[None]:
        try:
            self._op(kind, path, extra)
            yield
        except OSError as error:
            raise _write_error(error, kind, path, wanted) from error

    @contextmanager
    def _reading(self, kind: str, path: Path) -> Iterator[None]:
        try:
            self._op(kind, path)
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
                raise CorruptCheckpointError(f"{path} is a link or no regular file") from error
            if error.errno == errno.EIO:
                raise CorruptCheckpointError(
                    f"{path}: the device cannot read it ({error.strerror})"
                ) from error
            raise CheckpointError(f"cannot {kind} {path}: {error.strerror or error}") from error


def _locked(handle: int, path: Path) -> bool:
    """Lock a file without waiting. Return False if another handle holds the lock."""
    from filelock import lock_descriptor

    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"there are no file locks here: nothing stops a second run from using {path.parent}",
            LoopkitWarning,
            stacklevel=5,
        )
        return True


def _open_below(directory: Path, name: str) -> int:
    """Open a regular file for reading, without following any link below ``directory``."""
    opened = _open_relative if os.open in os.supports_dir_fd else _open_checked
    handle = opened(directory, name.split("/"))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.ELOOP, "not a regular file")
    return handle


def _open_relative(directory: Path, parts: list[str]) -> int:
    """Open each folder relative to the one before, so that no folder can be swapped meanwhile."""
    handle = os.open(directory, _DIRECTORY)
    try:
        for folder in parts[:-1]:
            inner = os.open(folder, _DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
        return os.open(parts[-1], _READ, dir_fd=handle)
    finally:
        os.close(handle)


def _open_checked(directory: Path, parts: list[str]) -> int:
    """Open a file by its path, after a check for links, where nothing else is possible (Windows)."""
    path = directory
    for part in parts:
        path = path / part
        if stat.S_ISLNK(os.lstat(path).st_mode):
            raise OSError(errno.ELOOP, "a link")
    return os.open(path, _READ)


def _write_error(error: OSError, kind: str, path: Path, wanted: int | None) -> Exception:
    code = error.errno
    if code in _FULL:
        reason = "no room"
        if code == errno.EFBIG:
            reason = "the file size limit is reached"
        elif code != errno.ENOSPC:
            reason = "the quota is used up"
        size = "" if wanted is None else f" of {wanted} bytes"
        full = DiskFullError(
            f"cannot {kind} {path}{size}: {reason}; {_free(path)} bytes are free there. "
            "What was saved before is intact."
        )
        full.errno = code
        return full
    if code in _DENIED:
        return RunDirError(
            f"cannot {kind} {path}: {error.strerror or error}. "
            "Choose a run directory that you can write to."
        )
    if code in (errno.ENOENT, errno.ENOTDIR):
        return RunDirError(f"cannot {kind} {path}: the directory is not there any more.")
    return CheckpointError(f"cannot {kind} {path}: {error.strerror or error}")


def _free(path: Path) -> int | str:
    """Return the free bytes of the file system that ``path`` lies on, or is to lie on."""
    for directory in (path, *path.parents):
        try:
            return shutil.disk_usage(directory).free
        except OSError:
            continue
    return "unknown"
