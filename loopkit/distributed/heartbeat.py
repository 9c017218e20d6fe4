"""Heartbeats: each rank reports once a second where it is, to tell a hang from a wait."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loopkit.distributed.environment import RankInfo

# Seconds between two heartbeats, and from one look at all ranks' heartbeats to the next.
_INTERVAL = 1.0
_LOOK_AGAIN = 1.6 * _INTERVAL
_LOOPKIT = f"{os.sep}loopkit{os.sep}"
_TORCH = f"{os.sep}torch{os.sep}"
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep

# What a rank reports: number, pid, identity of the process, and where its main thread is.
Report = dict[str, Any]


class Heartbeat:
    """Reports this rank to the store where all ranks meet.

    A thread sends the heartbeats over a connection of its own.
    """

    def __init__(self, rank_info: RankInfo) -> None:
        self._rank_info = rank_info
        self._store: Any = None
        self._watched = threading.main_thread().ident
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._send, name="loopkit-heartbeat", daemon=True)
        self._thread.start()
        # A thread that is inside torch when the interpreter ends would abort the process.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Send no more heartbeats."""
        self._stopped.set()
        self._thread.join(2 * _INTERVAL)

    def _send(self) -> None:
        number = 0
        # If the store is gone, the processes that would read from it are gone too.
        with suppress(RuntimeError):
            self._store = TCPStore(
                self._rank_info.host,
                self._rank_info.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=5),
            )
            while not self._stopped.is_set():
                number += 1
                frame = sys._current_frames().get(self._watched or 0)
                report: Report = {
                    "number": number,
                    "pid": os.getpid(),
                    "identity": identity_of(os.getpid()),
                    "at": "" if frame is None else describe(frame),
                }
                self._store.set(self._key(self._rank_info.rank), json.dumps(report))
                self._stopped.wait(_INTERVAL)

    def _key(self, rank: int) -> str:
        return f"loopkit/heartbeat/{self._rank_info.attempt}/{rank}"

    def diagnose(self) -> str:
        """Describe which ranks did not come to where the others wait, and kill them.

        Only ranks on this machine are killed. They would keep the launcher waiting.
        """
        before = self._read_reports()
        time.sleep(_LOOK_AGAIN)
        after = self._read_reports()
        dead = [r for r, report in after.items() if report is None or report == before.get(r)]
        if dead:
            for rank in dead:
                self._kill(after[rank])
            last = "".join(f"; rank {r} was last at {after[r]['at']}" for r in dead if after[r])  # type: ignore[index]
            return (
                f"hung: {_ranks(dead)} stopped: no heartbeat for at least {_LOOK_AGAIN:g} s{last}"
            )
        others = {r: report["at"] for r, report in after.items() if report}
        others.pop(self._rank_info.rank, None)
        elsewhere = [rank for rank, at in others.items() if "waiting" not in at]
        for rank in elsewhere:
            self._kill(after[rank])
        late = _ranks(elsewhere or list(others))
        positions = "; ".join(f"rank {rank} at {at}" for rank, at in others.items())
        return f"hung: {late} did not come to where the others wait. {positions}"

    def _read_reports(self) -> dict[int, Report | None]:
        reports: dict[int, Report | None] = {}
        for rank in range(self._rank_info.size):
            # A rank that has stopped may be the one that holds the store.
            try:
                there = self._store is not None and self._store.check([self._key(rank)])
                reports[rank] = json.loads(self._store.get(self._key(rank))) if there else None
            except RuntimeError:
                reports[rank] = None
        return reports

    def _kill(self, report: Report | None) -> None:
        if report and report["pid"] != os.getpid():
            kill_process(report["pid"], report["identity"])


def identity_of(pid: int) -> list[str] | None:
    """Return what no other process has had since this machine's start, together with ``pid``.

    It is the machine's boot, the namespace in which ``pid`` counts, and when the process started.

    Returns:
        None where the system does not tell, or there is no such process.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # The name of a process, in brackets, may hold anything. The start is field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return [boot, namespace, fields[19]]
    except (OSError, IndexError):
        return None


def kill_process(pid: int, identity: list[str] | None) -> None:
    """Kill the process ``pid`` if it is the one that had ``identity``; another one is left alone."""
    if identity is None or not hasattr(os, "pidfd_open"):
        return
    with suppress(OSError):
        # The descriptor stays that of this process, also if the number is given to another one.
        descriptor = os.pidfd_open(pid)
        try:
            if identity_of(pid) == identity:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        finally:
            os.close(descriptor)


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def describe(frame: FrameType) -> str:
    """Return where a thread is, with ", waiting" appended if it waits in a collective.

    The line is the innermost one of the user's code, or else of loopkit's.
    """
    waiting = False
    ours = ""
    here: FrameType | None = frame
    while here is not None:
        file = here.f_code.co_filename
        is_collective = "distributed" in file or here.f_code.co_name == "_engine_run_backward"
        waiting = waiting or (_TORCH in file and is_collective)
        line = f"{os.path.basename(file)}:{here.f_lineno} in {here.f_code.co_name}"
        if _LOOPKIT in file:
            ours = ours or line
        elif not file.startswith(("<", _STANDARD_LIBRARY)) and _TORCH not in file:
            return f"{line}{', waiting' if waiting else ''}"
        here = here.f_back
    return f"{ours or frame.f_code.co_name}{', waiting' if waiting else ''}"
