"""Pulse: each rank says once a second that it lives and where it is, so that a hang can be told
from a wait.
"""

from __future__ import annotations

import atexit
import json
import os
import platform
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import FrameType
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loopkit.distributed.environment import RankInfo

_PERIOD = 1.0
_OURS = f"{os.sep}loopkit{os.sep}"
_TORCH = f"{os.sep}torch{os.sep}"
_LIBRARY = os.path.dirname(os.__file__) + os.sep


class Heartbeat:
    """Reports this rank to the store at which all of them met, from a thread with a connection of
    its own.

    Attributes:
        last: what this rank said last.
    """

    def __init__(self, place: RankInfo) -> None:
        self.place = place
        self.last: dict[str, Any] = {}
        self._store: Any = None
        self._watched = threading.main_thread().ident
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="loopkit-pulse", daemon=True)
        self._thread.start()
        atexit.register(
            self.stop
        )  # a thread that is still in torch when the interpreter goes aborts the process

    def stop(self) -> None:
        """Fall silent."""
        self._over.set()
        self._thread.join(2 * _PERIOD)

    def _beat(self) -> None:
        number = 0
        with suppress(RuntimeError):  # the store is gone, and with it whoever would ask
            self._store = TCPStore(
                self.place.host,
                self.place.port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=5),
            )
            while not self._over.is_set():
                number += 1
                about = {
                    "number": number,
                    "pid": os.getpid(),
                    "host": platform.node(),
                    "at": self._where(),
                }
                self._store.set(self._key(self.place.rank), json.dumps(about))
                self._over.wait(_PERIOD)

    def _key(self, rank: int) -> str:
        return f"loopkit/pulse/{self.place.attempt}/{rank}"

    def _where(self) -> str:
        frame = sys._current_frames().get(self._watched or 0)
        return "" if frame is None else describe(frame)

    def diagnose(self) -> str:
        """Which ranks are not where the others wait; those of this machine are ended, as the run
        is.
        """
        before = self._read()
        time.sleep(1.6 * _PERIOD)
        after = self._read()
        dead = [r for r, said in after.items() if said is None or said == before.get(r)]
        if dead:
            for rank in dead:
                self._end(after[rank])
            return (
                f"hung: {_ranks(dead)} stopped: nothing was heard of it for {1.6 * _PERIOD:g} s or "
                f"longer"
                + "".join(
                    f"; rank {rank} was last at {said['at']}"
                    for rank, said in after.items()
                    if rank in dead and said
                )
            )
        places = {
            rank: said["at"] for rank, said in after.items() if said and rank != self.place.rank
        }
        elsewhere = [rank for rank, at in places.items() if "waiting" not in at]
        for rank in elsewhere:
            self._end(after[rank])
        elsewhere = elsewhere or list(places)
        told = "; ".join(f"rank {rank} at {at}" for rank, at in places.items())
        return f"hung: {_ranks(elsewhere)} did not come to where the others wait. {told}"

    def _read(self) -> dict[int, dict[str, Any] | None]:
        said: dict[int, dict[str, Any] | None] = {}
        for rank in range(self.place.size):
            try:
                there = self._store is not None and self._store.check([self._key(rank)])
                said[rank] = json.loads(self._store.get(self._key(rank))) if there else None
            except RuntimeError:  # the store is with a rank that has stopped
                said[rank] = None
        return said

    def _end(self, said: dict[str, Any] | None) -> None:
        if said and said["host"] == platform.node() and said["pid"] != os.getpid():
            with suppress(ProcessLookupError):
                os.kill(said["pid"], signal.SIGKILL)


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def describe(frame: FrameType) -> str:
    """Where a thread is: the innermost line that is the user's (else loopkit's), and whether it
    waits for ranks.
    """
    waiting, ours, inner = False, "", frame
    here: FrameType | None = frame
    while here is not None:
        file = here.f_code.co_filename
        collective = "distributed" in file or here.f_code.co_name == "_engine_run_backward"
        waiting = waiting or (_TORCH in file and collective)
        where = f"{os.path.basename(file)}:{here.f_lineno} in {here.f_code.co_name}"
        if _OURS in file:
            ours = ours or where
        elif not file.startswith(("<", _LIBRARY)) and _TORCH not in file:
            return f"{where}{', waiting' if waiting else ''}"
        here = here.f_back
    return f"{ours or inner.f_code.co_name}{', waiting' if waiting else ''}"
