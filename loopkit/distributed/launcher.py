"""Launching: a plain ``python train.py`` starts the ranks it asks for, and ends as the first of
them to fail ends.

Each rank runs the same script anew, with torchrun's environment, so a script is written once for
all ways to start it. The process that the user started only watches: it never comes back from
``Fit``, and ends with the exit code of the ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any

_POLL = 0.02
_LAST_WORDS = 2.0
_STOP = 30.0


def command() -> list[str] | None:
    """What starts this program again; None without a script: in an interactive session, a notebook,
    ``python -c``.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return [sys.executable, "-u", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    script = getattr(main, "__file__", None)
    if script is None or not os.path.exists(script):
        return None
    return [sys.executable, "-u", os.path.abspath(script), *sys.argv[1:]]


def launch(count: int, words: list[str]) -> int:
    """Start ``count`` ranks on this machine with the command line ``words``, and watch them to
    their end.

    SIGTERM, SIGINT and SIGUSR1 are passed on, once each. When a rank fails, the others get two
    seconds for their last words and are ended; what is told is the traceback of the first that
    failed by itself.

    Returns:
        The exit code: 0, or that of the failure.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    sys.stdout.flush()
    # Held here, the store outlives any rank, and the system chooses its port.
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    place = Path(tempfile.mkdtemp(prefix="loopkit-launch-"))
    ranks = Ranks(words, count, place, store.port)
    try:
        with ranks.signals():
            return ranks.watch()
    finally:
        ranks.kill()
        shutil.rmtree(place, ignore_errors=True)


class Ranks:
    """The processes of one launch.

    Args:
        words: the command line.
        count: how many.
        place: a directory for their failure records, and for what all but the first write to
            stderr.
        port: of the store where they meet.
    """

    def __init__(self, words: list[str], count: int, place: Path, port: int) -> None:
        self.place = place
        self.stopping: float | None = None
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        shared = {
            "WORLD_SIZE": count,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": threads,
            "LOOPKIT_LAUNCH": place,
            "LOOPKIT_PARENT": os.getpid(),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        for rank in range(count):
            env = {**os.environ, **{name: str(value) for name, value in shared.items()}}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # What a script prints should show once. Sessions of their own, so that Ctrl-C comes
            # through us, once.
            out: IO[bytes] | None = None if rank == 0 else (place / f"stderr-{rank}").open("wb")
            quiet = {} if rank == 0 else {"stdout": subprocess.DEVNULL, "stderr": out}
            self.processes.append(subprocess.Popen(words, env=env, start_new_session=True, **quiet))  # type: ignore[call-overload]
            if out is not None:
                out.close()

    def signals(self) -> Any:
        """A context that passes signals on to the ranks."""
        return SignalForwarder(self)

    def pass_on(self, number: int) -> None:
        """Send a signal to every rank that runs."""
        if number != getattr(signal, "SIGUSR1", None) and self.stopping is None:
            self.stopping = time.monotonic()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """End whatever still runs."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()

    def watch(self) -> int:
        """Wait for the end of all; returns the exit code, after telling what failed."""
        first: int | None = None
        since = 0.0
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [rank for rank, code in enumerate(codes) if code]
            if first is None and failed:
                first, since = failed[0], time.monotonic()
            if None not in codes:
                break
            if first is not None and time.monotonic() - since > (
                _LAST_WORDS if self.stopping is None else _STOP
            ):
                self.kill()
                break
            time.sleep(_POLL)
        return 0 if first is None else self._tell(first, codes)

    def _tell(self, first: int, codes: list[int | None]) -> int:
        records = [
            json.loads(path.read_text()) for path in sorted(self.place.glob("failure-*.json"))
        ]
        told = {record["rank"]: record for record in records}
        silent = [
            first,
            *range(len(codes)),
        ]  # ranks that ended without a word, the first to be seen in front
        silent = [rank for rank in silent if codes[rank] is not None and rank not in told]
        hung = [
            record for record in records if record["why"] == "hung"
        ]  # whose rank ends the one that it waits for
        causes = hung or [record for record in records if record["why"] == "own"]
        if hung or (causes and not (codes[first] or 0) < 0):
            cause = min(causes, key=lambda record: record["at"])
            print(f"rank {cause['rank']} failed:\n{cause['text']}", file=sys.stderr)
            return int(cause["code"])
        rank = silent[0] if silent else first
        code = codes[rank] or 0
        if code > 0 and not records:  # it said what it had to say, as SystemExit(143) does
            return code
        self._tell_silent(rank, code)
        return 128 - code if code < 0 else code or 1

    def _tell_silent(self, rank: int, code: int) -> None:
        said = self.place / f"stderr-{rank}"
        words = said.read_text(errors="replace").strip().splitlines()[-30:] if said.exists() else []
        how = (
            f"was ended by signal {signal.Signals(-code).name}"
            if code < 0
            else f"ended with exit code {code}"
        )
        how += " while the others went on" if code >= 0 else ""
        hint = " (out of memory ends a process like this)" if code == -9 else ""
        print("\n".join([*words, f"rank {rank} {how}{hint}"]), file=sys.stderr)


class SignalForwarder:
    """A context in which this process's signals go to the ranks."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        def pass_on(number: int, frame: FrameType | None) -> None:
            self.ranks.pass_on(number)

        if threading.current_thread() is threading.main_thread():
            wanted = [
                signal.SIGTERM,
                signal.SIGINT,
                *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []),
            ]
            self.before = {number: signal.signal(number, pass_on) for number in wanted}

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def die_with_parent() -> None:
    """Have Linux end this process when the launcher is gone, however it went."""
    parent = os.environ.get("LOOPKIT_PARENT")
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it went before we asked
            os._exit(1)
