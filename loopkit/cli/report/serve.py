"""A live page of runs, served on this machine alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from loopkit.cli.report.html_page import html_page
from loopkit.cli.report.run_data import ARRAYS, ROWS
from loopkit.errors import LoopkitError, OptionError
from loopkit.run_file import RUN_FILE

LOOPBACK = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Serves the page at ``/`` and its values at ``/data``, as they are at each request.

    ``/data`` answers 304 as long as no file of the runs has changed.

    Args:
        values: returns what the page shows now.
        state: returns a text that changes with the files of the runs.
        port: 0 for a free one.

    Raises:
        OptionError: the port is taken.
    """

    daemon_threads = True

    def __init__(
        self, values: Callable[[], dict[str, Any]], state: Callable[[], str], port: int
    ) -> None:
        self.values, self.state = values, state
        try:
            super().__init__((LOOPBACK, port), _Answers)
        except OSError as error:
            raise OptionError(f"--port {port} cannot be used: {error.strerror}") from error
        self.url = f"http://{LOOPBACK}:{self.server_address[1]}/"


class _Answers(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        # A page of another site could otherwise read the runs, by a name that leads to this machine.
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (LOOPBACK, "localhost"):
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", "this page is for this machine alone")
            return
        try:
            if self.path == "/":
                self._answer(HTTPStatus.OK, "text/html", html_page(self.server.values()))
            elif self.path == "/data":
                self._data()
            else:
                self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there are / and /data")
        except LoopkitError as error:
            self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", str(error))

    def _data(self) -> None:
        state = f'"{self.server.state()}"'
        if self.headers.get("If-None-Match") == state:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.end_headers()
            return
        text = json.dumps(self.server.values(), ensure_ascii=False, allow_nan=False)
        self._answer(HTTPStatus.OK, "application/json", text, {"ETag": state})

    def _answer(
        self, status: HTTPStatus, kind: str, text: str, headers: dict[str, str] | None = None
    ) -> None:
        content = text.encode("utf-8", "backslashreplace")
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(content)),
            "Cache-Control": "no-cache",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the page asks each second."""


def files_state(run_dirs: list[Path], statuses: list[str]) -> str:
    """Return a text that changes when a run logs, saves, ends or is killed."""
    parts = []
    for run_dir, status in zip(run_dirs, statuses):
        for name in (ROWS, ARRAYS, RUN_FILE, "checkpoints"):
            try:
                found = (run_dir / name).stat()
                parts.append(f"{found.st_mtime_ns:x}.{found.st_size:x}")
            except OSError:
                parts.append("-")
        parts.append(f"{status}{len(str(run_dir))}")
    return "_".join(parts)
