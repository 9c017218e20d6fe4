"""The one door for checkpoint file I/O: tests count, fail or kill at any operation in
``Store._op``.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loopkit.checkpoint.format import safe_name
from loopkit.checkpoint.streams import Sink, Source
from loopkit.errors import (
    CheckpointError,
    CorruptCheckpointError,
    DiskFullError,
    LoopkitWarning,
    RunDirError,
)

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EROFS, errno.EACCES, errno.EPERM}
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# O_NONBLOCK, so that a named pipe put in a file's place cannot stop us.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Store:
    """File operations that are durable when they say so and that name the path when they fail.

    Writing raises ``DiskFullError`` (no room, quota, file size limit), ``RunDirError`` (not
    permitted, read only, vanished) or ``CheckpointError``. Reading raises ``FileNotFoundError`` for
    what is not there, ``CorruptCheckpointError`` for what is not a regular file inside its
    directory, ``CheckpointError`` else.

    Args:
        maps: leave the tensors of the model and the optimizer in their files, verified, as maps of
            them: for those who need only parts. What is in several pieces comes as
            :class:`~loopkit.checkpoint.format.Pieces`.
    """

    maps = False

    def __init__(self, *, maps: bool = False) -> None:
        self.maps = maps

    def _op(self, kind: str, path: Path, extra: Any = None) -> None:
        """Called before each operation; ``extra`` is the target of a rename or the bytes of a
        write.
        """

    def mkdir(self, path: Path) -> bool:
        """Make one directory; whether it was not there before."""
        with self._writing("mkdir", path):
            try:
                os.mkdir(path)
            except FileExistsError:
                return False
            return True

    def create(self, path: Path, size: int | None = None) -> Sink:
        """A new file; it must not exist. ``size`` (bytes expected) only serves error messages."""
        with self._writing("create", path, wanted=size):
            return Sink(self._writing, path, os.open(path, _CREATE, 0o666), size)

    def write_bytes(self, path: Path, data: bytes) -> Sink:
        """A new durable file; the sink that is returned is closed and knows size and SHA-256."""
        with self.create(path, len(data)) as sink:
            sink.write(data)
        return sink

    def write_below(self, directory: Path, name: str, data: bytes) -> Sink:
        """As :meth:`write_bytes`, making the folders in ``name`` where they are not there, all
        durable.

        The names in ``directory`` itself are not synced.
        """
        folders = [directory / folder for folder in reversed(Path(name).parents[:-1])]
        for folder in folders:
            self.mkdir(folder)
        sink = self.write_bytes(directory / name, data)
        for folder in folders:
            self.sync_dir(folder)
        return sink

    def open(self, directory: Path, name: str, hashed: bool = True) -> Source:
        """A file below ``directory`` for reading; no symbolic link below ``directory`` is followed.

        Its SHA-256 is computed on the way when ``hashed``.
        """
        if not safe_name(name):
            raise CorruptCheckpointError(
                f"{directory}: {name!a} is not a name inside the checkpoint"
            )
        path = directory / name
        with self._reading("open", path):
            return Source(self._reading, path, _open_below(directory, name), hashed)

    def read_bytes(self, directory: Path, name: str, limit: int) -> bytes:
        """The whole of a file of at most ``limit`` bytes; ``CorruptCheckpointError`` when it is
        larger.
        """
        with self.open(directory, name) as source:
            if source.size > limit:
                raise CorruptCheckpointError(
                    f"{source.path}: {source.size} bytes, more than {limit}"
                )
            return source.read_all()

    def rename(self, path: Path, target: Path) -> None:
        """Move within one file system; a file that has the target's name is replaced at once."""
        with self._writing("rename", path, extra=target):
            os.rename(path, target)

    def sync_dir(self, path: Path) -> None:
        """Make the names in a directory durable."""
        with self._writing("sync_dir", path):
            handle = os.open(path, _DIRECTORY)
            try:
                os.fsync(handle)
            except OSError as error:
                # Some network file systems cannot sync a directory and keep names safe themselves.
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
            finally:
                os.close(handle)

    def names(self, path: Path) -> list[str]:
        """The names in a directory, sorted; none when it does not exist."""
        with self._reading("names", path):
            try:
                return sorted(os.listdir(path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def is_dir(self, path: Path, follow: bool = False) -> bool:
        """Whether ``path`` is a directory; a symbolic link to one only counts with ``follow``."""
        with self._reading("stat", path):
            try:
                return stat.S_ISDIR(os.stat(path, follow_symlinks=follow).st_mode)
            except FileNotFoundError:
                return False

    def remove(self, path: Path) -> None:
        """Delete a file or a symbolic link, if it is there."""
        with self._writing("remove", path):
            try:
                os.unlink(path)
            except FileNotFoundError:
                return

    def remove_tree(self, path: Path) -> None:
        """Delete a directory and all that is in it, or a file; links are deleted, not followed."""
        if not self.is_dir(path):
            self.remove(path)
            return
        for name in self.names(path):
            self.remove_tree(path / name)
        with self._writing("rmdir", path):
            os.rmdir(path)

    def lock(self, path: Path, content: bytes) -> int | None:
        """A handle that locks ``path``, filled with ``content``; ``None`` when another handle does."""
        with self._writing("lock", path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                _flock(handle, path)
                os.ftruncate(handle, 0)
                os.pwrite(handle, content, 0)
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            return handle

    def unlock(self, handle: int, clear: bool = True) -> None:
        """Close a handle of :meth:`lock`, which ends the lock where no other process has it open."""
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


def _flock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        text = f"this file system has no locks: nothing stops a second run from using {path.parent}"
        warnings.warn(text, LoopkitWarning, stacklevel=4)


def _open_below(directory: Path, name: str) -> int:
    handle = os.open(directory, _DIRECTORY)
    try:
        *folders, last = name.split("/")
        for folder in folders:
            inner = os.open(folder, _DIRECTORY | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = inner
        found = os.open(last, _READ, dir_fd=handle)
    finally:
        os.close(handle)
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise OSError(errno.ELOOP, "not a regular file")
    return found


def _write_error(error: OSError, kind: str, path: Path, wanted: int | None) -> Exception:
    code = error.errno
    if code in _FULL:
        what = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file size limit is reached"}
        size = "" if wanted is None else f" of {wanted} bytes"
        full = DiskFullError(
            f"cannot {kind} {path}{size}: {what.get(code or 0, 'no room')}; {_free(path)} bytes "
            f"are "
            "free there. What was saved before is intact."
        )
        full.errno = code
        return full
    if code in _DENIED:
        return RunDirError(
            f"cannot {kind} {path}: {error.strerror or error}. Choose a run directory you can "
            f"write."
        )
    if code in (errno.ENOENT, errno.ENOTDIR):
        return RunDirError(f"cannot {kind} {path}: the directory is not there any more.")
    return CheckpointError(f"cannot {kind} {path}: {error.strerror or error}")


def _free(path: Path) -> int | str:
    for place in (path, *path.parents):
        try:
            found = os.statvfs(place)
        except OSError:
            continue
        return found.f_bavail * found.f_frsize
    return "unknown"
