"""TrackioLogger: Trackio, in a database on this machine or in a Space."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loopkit.keywords import checks_keywords
from loopkit.loggers.remote import Opening, RemoteLogger, Row, drawn


@checks_keywords
class TrackioLogger(RemoteLogger):
    """Scalars by step, the config, 1-D arrays as histograms, 2-D ones (up to 10,000 cells) as
    tables.

    Trackio finds a run by its name: one that was not given gets a few letters of its own.

    Args:
        project, name, timeout: as ``RemoteLogger``.
        group: of the run.
        space_id: the Space to log to; None takes $TRACKIO_SPACE_ID, or else a database in
            $TRACKIO_DIR.
        settings: everything else that ``trackio.init`` takes.
    """

    name = package = extra = "trackio"

    def __init__(
        self,
        project: str | None = None,
        name: str | None = None,
        *,
        group: str | None = None,
        space_id: str | None = None,
        timeout: float = 60.0,
        **settings: Any,
    ) -> None:
        super().__init__(project, name, timeout)
        self._settings = {"group": group, "space_id": space_id, "embed": False, **settings}

    def _start(self, opening: Opening) -> str:
        name = opening.id or self._run_name or f"{opening.name}-{secrets.token_hex(3)}"
        with _printing_to_stderr():
            self._service = run = self._api.init(
                project=opening.project,
                name=name,
                config=opening.hparams,
                resume="allow" if opening.id else "never",
                **self._settings,
            )
        return str(run.name)

    def _send(self, rows: list[Row]) -> None:
        for values, step in rows:
            self._service.log(values, step=step)

    def _send_array(self, name: str, array: Any, step: int) -> None:
        found = drawn(self._api, array)
        if found is not None:
            self._service.log({name: found}, step=step)

    def _stop(self, status: str) -> None:
        with _printing_to_stderr():
            self._service.finish()


class _Elsewhere:
    """Standard output for all threads but one, whose words go to stderr."""

    def __init__(self, out: Any) -> None:
        self._out, self._thread = out, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr if threading.get_ident() == self._thread else self._out, name)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Inside, what this thread prints goes to stderr: Trackio prints, and stdout is the user's."""
    before, sys.stdout = sys.stdout, _Elsewhere(sys.stdout)
    mine = sys.stdout
    try:
        yield
    finally:
        if sys.stdout is mine:
            sys.stdout = before
