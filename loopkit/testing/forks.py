"""Work in forked processes, and stores that fail or kill at a file operation of one's choice."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from loopkit.checkpoint import Store
from loopkit.errors import HungError, OptionError

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
        """Act at the operation that has this number, from 1."""


class KillAt(Counting):
    """Ends the process, as a power switch would, right before an operation."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def at(self, count: int, kind: str, path: Path) -> None:
        """Kill, if it is time."""
        if count == self.count:
            os.kill(os.getpid(), signal.SIGKILL)


class FailAt(Counting):
    """Raises an ``OSError`` at one operation, or at all from that one on."""

    def __init__(self, count: int, code: int = errno.ENOSPC, onwards: bool = False) -> None:
        super().__init__()
        self.count, self.code, self.onwards = count, code, onwards

    def at(self, count: int, kind: str, path: Path) -> None:
        """Raise, if it is time."""
        if count == self.count or (self.onwards and count > self.count):
            raise OSError(self.code, os.strerror(self.code), str(path))


@contextmanager
def injecting(store: Counting) -> Iterator[None]:
    """Inside, every store of this process meets the fate of ``store``."""
    with mock.patch.object(Store, "_op", lambda self, *operation: store._op(*operation)):
        yield


@dataclass(frozen=True)
class Ended:
    """How a forked process ended.

    Attributes:
        code: 0 done, 1 an error, 143 after a SIGTERM, or minus the number of the signal.
        value: what the action returned, as JSON keeps it; None without an end in order.
        error: the traceback of an error.
    """

    code: int
    value: Any = None
    error: str = ""


class Forked:
    """A forked process that runs ``action`` on one thread.

    Raises:
        OptionError: this process cannot fork, or has used a CUDA device, which no fork survives.
    """

    def __init__(
        self, action: Callable[[], Any], environment: dict[str, str] | None = None
    ) -> None:
        if not hasattr(os, "fork") or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            raise OptionError(
                "this check forks: run it on Linux or macOS, in a process that has not used CUDA"
            )
        handle, self._answer = tempfile.mkstemp(prefix="loopkit-fork-")
        os.close(handle)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(action, environment or {})

    def _run(self, action: Callable[[], Any], environment: dict[str, str]) -> None:
        code, value, error = 1, None, ""
        try:
            torch.set_num_threads(1)
            os.environ.update(environment)
            value = action()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            error = traceback.format_exc()
        finally:
            Path(self._answer).write_text(json.dumps([value, error]))
            sys.stderr.flush()
            os._exit(code)

    def wait(self, until: float | None = None) -> Ended:
        """Wait for the process, and return how it ended.

        Args:
            until: the time of ``time.monotonic`` at which the process is killed; None waits.

        Raises:
            HungError: the time is over.
        """
        code = self._code(until)
        text = Path(self._answer).read_text()
        os.unlink(self._answer)
        return Ended(code, *(json.loads(text) if text else ()))

    def _code(self, until: float | None) -> int:
        if until is None:
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise HungError(
                    "a forked rank did not end in time. A fork can hang where libraries have started "
                    "threads, as after other trainings: run this check first in a process of its own"
                )
            time.sleep(0.02)


def in_fork(action: Callable[[], Any]) -> Ended:
    """Run ``action`` in a forked process, and return how it ended."""
    return Forked(action).wait()


def on_forked_ranks(count: int, action: Callable[[], Any], timeout: float) -> list[Ended]:
    """Run ``action`` in ``count`` forked processes that have torchrun's environment.

    Args:
        count: the number of ranks.
        action: what each runs.
        timeout: seconds until the ranks are killed.

    Raises:
        HungError: a rank did not end within ``timeout``.
    """
    until = time.monotonic() + timeout
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = [
        Forked(
            action,
            {name: str(value) for name, value in {**shared, "RANK": n, "LOCAL_RANK": n}.items()},
        )
        for n in range(count)
    ]
    try:
        return [rank.wait(until) for rank in ranks]
    except HungError:
        for rank in ranks:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(rank.pid, signal.SIGKILL)
                os.waitpid(rank.pid, 0)
        raise


def kill_at_every_operation(
    prepare: Callable[[Path], None],
    act: Callable[[Store, Path], object],
    check: Callable[[Path], None],
) -> int:
    """Kill ``act`` at its 1st, 2nd, … operation, each in a fresh directory, until it gets through.

    Args:
        prepare: fills the directory.
        act: does the operations with the store that it is given.
        check: looks at the directory after each kill, and after the end.

    Returns:
        The number of kills.
    """
    count = 0
    while True:
        with tempfile.TemporaryDirectory(dir=MEMORY) as name:
            run_dir = Path(name)
            prepare(run_dir)
            ended = in_fork(partial(_call, act, KillAt(count + 1), run_dir))
            if ended.code not in (0, -signal.SIGKILL):
                raise AssertionError(f"the process ended with {ended.code}: {ended.error}")
            try:
                check(run_dir)
            except BaseException as error:
                raise AssertionError(f"after a kill at operation {count + 1}: {error}") from error
            if ended.code == 0:
                return count
            count += 1


def _call(act: Callable[[Store, Path], object], store: Store, run_dir: Path) -> None:
    act(store, run_dir)  # JSON may not keep the result
