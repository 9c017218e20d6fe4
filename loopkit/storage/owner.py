"""Owner: one run at a time writes to a place in a store. It shows there that it is alive."""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from loopkit.checkpoint.staging import is_running, start_time
from loopkit.errors import RunDirError, StorageError
from loopkit.run_file import SILENCE, timestamp
from loopkit.storage.remote_files import Remote
from loopkit.storage.retries import Retries

logger = logging.getLogger(__name__)

OWNER = ".owner.json"
BEAT = 15.0
"""Seconds between two signs of life."""
LEASE = 60.0
"""Seconds without a sign of life after which another run may take the place."""
_LIMIT = 1 << 16
_MOST_WAIT = 5.0  # seconds


class Owner:
    """The right of one run to write to a place, from ``take`` until ``release``.

    A file in the place names the run, and a thread renews it. Whoever wants the place waits
    until the file does not change any more, by its own clock. A run that was replaced finds
    another name in the file, and stops to write.

    Args:
        remote: the place.

    Attributes:
        id: a new random name for this start.
        before: what the file said before; empty if there was none.
    """

    def __init__(self, remote: Remote) -> None:
        self.id = secrets.token_hex(8)
        self.before: dict[str, Any] = {}
        # A sign of life that comes late is worth nothing: it is not tried again.
        self._remote = remote.with_retries(Retries(0.0, refusals=True))
        self._patient = remote
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._beats = 0
        self._other: dict[str, Any] = {}

    def look(self) -> dict[str, Any]:
        """Read what the file says, and return it."""
        self.before = _read(self._patient)
        return self.before

    def take(self, say: Callable[[str], None]) -> None:
        """Take the place, once no other run uses it.

        Args:
            say: shows a line, where this has to wait.

        Raises:
            RunDirError: a run that is alive uses it.
            StorageError: nothing can be written there.
        """
        before = self.before
        if before and not before.get("released") and _may_live(before):
            say(
                f"{self._patient.url} was in use by {_shown(before)}. Waiting up to {LEASE:.0f} s for "
                "a sign that it still is"
            )
            self._wait_for_silence(before)
        self._patient.put(OWNER, self._text())
        self._thread = threading.Thread(target=self._renew, name="loopkit-owner", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that no other run has taken the place.

        Raises:
            RunDirError: one has.
        """
        if self._other:
            raise RunDirError(
                f"{self._patient.url} was taken over by {_shown(self._other)}, because this run "
                "gave no sign of life: it uploads nothing more. Choose another run_dir"
            )

    def release(self, *, unused: bool = False) -> None:
        """Let another run use the place at once.

        Args:
            unused: leave the file as it was before, because this run has written nothing.
        """
        if self._thread is None:
            return
        self._ended.set()
        self._thread.join(_MOST_WAIT)
        hangs, self._thread = self._thread.is_alive(), None
        if self._other or hangs:
            return
        try:
            if not unused:
                self._remote.put(OWNER, self._text(released=True))
            elif self.before:
                self._remote.put(OWNER, json.dumps(self.before | {"released": True}).encode())
            else:
                self._remote.remove([OWNER])
        except StorageError as error:
            logger.info("%s", error)

    def _wait_for_silence(self, before: dict[str, Any]) -> None:
        end = time.monotonic() + LEASE
        while time.monotonic() < end:
            time.sleep(min(1.0, LEASE / 4))
            now = _read(self._patient)
            if now.get("released"):
                return
            if now != before:
                raise RunDirError(
                    f"{self._patient.url} is in use by {_shown(now)}. Choose another run directory, "
                    "or end that run"
                )

    def _renew(self) -> None:
        while not self._other and not self._ended.wait(BEAT):
            self._renew_once()

    def _renew_once(self) -> None:
        try:
            now = _read(self._remote)
            if now and now.get("id") != self.id:
                self._other = now
                return
            self._beats += 1
            self._remote.put(OWNER, self._text())
        except StorageError as error:
            logger.info("no sign of life: %s", error)

    def _text(self, *, released: bool = False) -> bytes:
        pid = os.getpid()
        about = {
            "id": self.id,
            "host": platform.node(),
            "pid": pid,
            "process_start": start_time(pid),
            "beats": self._beats,
            "updated": timestamp(time.time()),
            "seconds": time.time(),
            "released": released,
        }
        return json.dumps(about).encode()


def _read(remote: Remote) -> dict[str, Any]:
    try:
        found = json.loads(remote.read(OWNER, _LIMIT))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _may_live(about: dict[str, Any]) -> bool:
    """Return whether the run that the file names may be alive, as far as that is known here."""
    pid = about.get("pid")
    if about.get("host") == platform.node() and isinstance(pid, int):
        # This process holds the lock of the local copy, so an earlier run of it has ended.
        same = is_running(pid) and start_time(pid) == about.get("process_start")
        return same and pid != os.getpid()
    seconds = about.get("seconds")
    return not isinstance(seconds, (int, float)) or abs(time.time() - seconds) < SILENCE


def _shown(about: dict[str, Any]) -> str:
    return f"process {about.get('pid')} on {about.get('host')} ({about.get('updated')})"
