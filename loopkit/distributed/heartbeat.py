"""Heartbeats: each rank reports once a second where it is, to tell a hang from a wait."""

from __future__ import annotations

import atexit
import json
import os
import platform
import signal
import socket
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
from loopkit.distributed.failures import Diagnosis

# Seconds between two heartbeats, and from one look at all ranks' heartbeats to the next.
_INTERVAL = 1.0
_LOOK_AGAIN = 1.6 * _INTERVAL
# Seconds to wait for an answer of the store's machine, to which the network may be cut.
_PATIENCE = 3.0
# Seconds that an exit waits for a heartbeat that is on its way.
_LAST_HEARTBEAT = 10.0
_LOOPKIT = f"{os.sep}loopkit{os.sep}"
_TORCH = f"{os.sep}torch{os.sep}"
_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep

# What a rank reports: number, pid, identity of the process, its machine, and where its main thread is.
Report = dict[str, Any]


class Heartbeat:
    """Reports this rank to the store where all ranks meet.

    A thread sends the heartbeats over a connection of its own, and makes another one if that is lost.
    """

    def __init__(self, rank_info: RankInfo) -> None:
        self._rank_info = rank_info
        self._watched = threading.main_thread().ident
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._send, name="loopkit-heartbeat", daemon=True)
        self._thread.start()
        # A thread that is inside torch when the interpreter ends would abort the process.
        atexit.register(self.stop)

    def stop(self) -> None:
        """Send no more heartbeats."""
        self._stopped.set()
        self._thread.join(_LAST_HEARTBEAT)

    def _send(self) -> None:
        number = 0
        while not self._stopped.is_set():
            # The network is cut for a time, or the store and its readers are gone.
            with suppress(OSError, RuntimeError):
                store, machine = self._connect()
                while not self._stopped.is_set():
                    number += 1
                    report: Report = {
                        "number": number,
                        "pid": os.getpid(),
                        "identity": identity_of(os.getpid()),
                        "machine": machine,
                        "at": self._position(),
                    }
                    store.set(self._key(self._rank_info.rank), json.dumps(report))
                    self._stopped.wait(_INTERVAL)
            self._stopped.wait(_INTERVAL)

    def _position(self) -> str:
        """Return where the watched thread is.

        Its frame is not kept. This thread would otherwise be the last to hold what the frame names,
        such as a process group, whose end waits for a thread that waits for Python's lock.
        """
        frame = sys._current_frames().get(self._watched or 0)
        return "" if frame is None else describe(frame)

    def _connect(self) -> tuple[Any, str]:
        """Return a connection to the store, and this machine's name and address as the store sees it.

        Raises:
            OSError: the store's machine does not answer, or no process there holds the store.
            RuntimeError: the connection was lost at once.
        """
        host, port = self._rank_info.host, self._rank_info.port
        # torch would try again, in a call that nothing can end.
        with socket.create_connection((host, port), timeout=_PATIENCE) as reached:
            machine = f"{platform.node()} ({reached.getsockname()[0]})"
            if self._stopped.is_set():
                raise OSError("the interpreter ends, and no call to torch may outlive it")
        store = TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=5)
        )
        return store, machine

    def _key(self, rank: int) -> str:
        return f"loopkit/heartbeat/{self._rank_info.attempt}/{rank}"

    def diagnose(self) -> Diagnosis:
        """Describe which ranks did not come to where the others wait, and kill them.

        Only ranks on this machine are killed. They would keep the launcher waiting.
        """
        try:
            store, machine = self._connect()
            before = self._read_reports(store)
            time.sleep(_LOOK_AGAIN)
            after = self._read_reports(store)
        except (OSError, RuntimeError) as error:
            return Diagnosis(self._describe_cut(error), cut_off=True)
        dead = [r for r, report in after.items() if report is None or report == before.get(r)]
        if dead:
            for rank in dead:
                self._kill(after[rank])
            return Diagnosis(f"hung: {self._describe_dead(dead, after, machine)}")
        others = {r: report["at"] for r, report in after.items() if report}
        elsewhere = [rank for rank, at in others.items() if "waiting" not in at]
        for rank in elsewhere:
            self._kill(after[rank])
        late = _ranks(elsewhere or list(others))
        positions = "; ".join(f"rank {rank} at {at}" for rank, at in others.items())
        return Diagnosis(f"hung: {late} did not come to where the others wait. {positions}")

    def _describe_cut(self, error: Exception) -> str:
        """Return that this rank cannot reach the store, and so knows nothing of the others."""
        info = self._rank_info
        cause = "the network between the two machines is cut, or that machine is gone"
        if isinstance(error, ConnectionRefusedError):
            cause = "the process there that held it has ended; see its messages"
        return (
            f"hung: rank {info.rank}, on {platform.node()}, cannot reach {info.host}:{info.port}, where "
            f"the ranks meet ({error}): {cause}"
        )

    def _describe_dead(self, dead: list[int], last: dict[int, Report | None], machine: str) -> str:
        """Return which ranks send no heartbeats, on which machine each was, and what it did last."""
        known = {rank: report for rank in dead if (report := last[rank]) is not None}
        far = [rank for rank in dead if rank not in known or known[rank]["machine"] != machine]
        for_long = f"no heartbeat for at least {_LOOK_AGAIN:g} s"
        text = f"{_ranks(dead)} stopped: {for_long}"
        if far:
            text = (
                f"{_ranks(dead)} cannot be reached from rank {self._rank_info.rank}, on {machine}: "
                f"{for_long}. The network between the two machines is cut, or the processes there "
                "have stopped"
            )
        places = {r: f" on {known[r]['machine']}" if r in far else "" for r in known}
        return text + "".join(
            f"; rank {rank} was last{places[rank]} at {known[rank]['at']}" for rank in known
        )

    def _read_reports(self, store: Any) -> dict[int, Report | None]:
        """Return the last report of each other rank; None where there is none yet."""
        reports: dict[int, Report | None] = {}
        for rank in range(self._rank_info.size):
            if rank != self._rank_info.rank:
                key = self._key(rank)
                reports[rank] = json.loads(store.get(key)) if store.check([key]) else None
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
