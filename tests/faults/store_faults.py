"""Stores that fail on purpose, and runs of many faults in forked processes."""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from loopkit.checkpoint import Store

# A kill does not care what the files are on, and memory syncs fast.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Counting(Store):
    """Counts the operations, and notes them."""

    def __init__(self) -> None:
        self.log: list[tuple[str, Path]] = []

    def _op(self, kind: str, path: Path, extra: Any = None) -> None:
        self.log.append((kind, path))
        self.at(len(self.log), kind, path)

    def at(self, count: int, kind: str, path: Path) -> None:
        """What happens at the operation that has this number, from 1."""


class KillAt(Counting):
    """Ends the process, as a power switch would, right before an operation."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def at(self, count: int, kind: str, path: Path) -> None:
        if count == self.count:
            os.kill(os.getpid(), signal.SIGKILL)


class FailAt(Counting):
    """Raises an ``OSError`` at one operation, or at all from that one on."""

    def __init__(self, count: int, code: int = errno.ENOSPC, onwards: bool = False):
        super().__init__()
        self.count, self.code, self.onwards = count, code, onwards

    def at(self, count: int, kind: str, path: Path) -> None:
        if count == self.count or (self.onwards and count > self.count):
            raise OSError(self.code, os.strerror(self.code), str(path))


def in_fork(action: Callable[[], object]) -> int:
    """Run ``action`` in a forked process; how it ended: 0 done, 1 an error (printed), -9 killed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_at_every_operation(
    prepare: Callable[[Path], None],
    act: Callable[[Store, Path], object],
    check: Callable[[Path], None],
) -> int:
    """Kill ``act`` at its 1st, 2nd, … operation, each in a fresh directory, until it gets through.

    ``check`` looks at the directory after each kill, and after the end. Returns the number of
    kills.
    """
    count = 0
    while True:
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            run_dir = Path(name)
            prepare(run_dir)
            status = in_fork(partial(act, KillAt(count + 1), run_dir))
            if status not in (0, -9):
                raise AssertionError(f"the process ended with {status}")
            try:
                check(run_dir)
            except BaseException as error:
                raise AssertionError(f"after a kill at operation {count + 1}: {error}") from error
            if status == 0:
                return count
            count += 1
