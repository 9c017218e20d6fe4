"""tensorboardX's SummaryWriter on an event file that loopkit writes, for what loopkit does not log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.writer import FileWriter


class _Records:
    """Takes the place of tensorboardX's queue and thread, which block training on a full disk."""

    def __init__(self, folder: Path, write: Callable[[Any], None]) -> None:
        self._folder = folder
        self.add_event = write

    def get_logdir(self) -> str:
        return str(self._folder)

    def flush(self) -> None:
        """Do nothing: each event is written at once."""

    def close(self) -> None:
        """Do nothing: the logger closes its file."""

    def reopen(self) -> None:
        """Do nothing: the file is open."""


class _Writer(SummaryWriter):  # type: ignore[misc]
    """A SummaryWriter that writes to ``records``."""

    def __init__(self, records: _Records) -> None:
        # FileWriter's constructor would open a file and start a thread.
        self._events: Any = FileWriter.__new__(FileWriter)
        self._events.event_writer = records
        self._events._default_metadata = {}
        super().__init__(logdir=records.get_logdir())

    def _get_file_writer(self) -> Any:
        self.file_writer = self._events
        self.all_writers = {self._events.get_logdir(): self._events}
        return self._events


def summary_writer(folder: Path, write: Callable[[Any], None]) -> Any:
    """Return a SummaryWriter whose events are given to ``write``.

    Args:
        folder: the folder of the event file.
        write: writes one event.
    """
    return _Writer(_Records(folder, write))
