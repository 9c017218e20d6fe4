"""TrackioLogger: a Trackio run, in a database on this machine or in a Space."""

from __future__ import annotations

import secrets
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loopkit.keywords import checks_keywords
from loopkit.loggers.media import Media
from loopkit.loggers.remote import RemoteLogger, Row, RunInfo, to_media, wav_file


@checks_keywords
class TrackioLogger(RemoteLogger):
    """Log to Trackio: scalars, the config, 1-D arrays as histograms and 2-D arrays as tables.

    Tables have up to 10,000 cells. Trackio finds a run by its name, so a few random letters are
    added to a name that the user did not give.

    Examples:
        >>> Fit(loggers=[TrackioLogger(project="digits")]).run(task)

    Args:
        project: as of ``RemoteLogger``.
        name: as of ``RemoteLogger``.
        timeout: as of ``RemoteLogger``.
        group: of the run.
        space_id: the Space to log to; None for $TRACKIO_SPACE_ID, or else a database in
            $TRACKIO_DIR.
        settings: other arguments of ``trackio.init``.
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

    def _start(self, info: RunInfo) -> str:
        name = info.id or self._run_name or f"{info.name}-{secrets.token_hex(3)}"
        with _printing_to_stderr():
            self._service = run = self._api.init(
                project=info.project,
                name=name,
                config=info.hparams,
                resume="allow" if info.id else "never",
                **self._settings,
            )
        return str(run.name)

    def _send(self, rows: list[Row]) -> None:
        for values, step in rows:
            self._service.log(values, step=step)

    def _send_array(self, name: str, array: Any, step: int) -> bool:
        media = to_media(self._api, array)
        if media is not None:
            self._service.log({name: media}, step=step)
        return media is not None

    def _send_media(self, media: Media, step: int) -> None:
        if media.kind == "audio":
            with wav_file(media) as path:
                self._service.log({media.name: self._api.Audio(path)}, step=step)
        else:
            made = {
                "image": self._api.Image,
                "histogram": self._api.Histogram,
                "text": self._api.Markdown,
            }[media.kind](media.value)
            self._service.log({media.name: made}, step=step)

    def _stop(self, status: str) -> None:
        with _printing_to_stderr():
            self._service.finish()


class _Redirected:
    """Standard output; what the thread that made it prints goes to stderr instead."""

    def __init__(self, out: Any) -> None:
        self._out, self._thread = out, threading.get_ident()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr if threading.get_ident() == self._thread else self._out, name)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Send what this thread prints to stderr: Trackio prints, and stdout belongs to the user."""
    before = sys.stdout
    redirected = sys.stdout = _Redirected(before)
    try:
        yield
    finally:
        if sys.stdout is redirected:
            sys.stdout = before
