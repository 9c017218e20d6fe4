"""Stores for tests: faults at any request, and a proxy that stands between a run and a server."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

from loopkit import Checkpoint, Fit
from loopkit.storage.checkpoints import RemoteCheckpoints
from loopkit.storage.copies import open_remote
from loopkit.storage.remote_files import Remote
from tests.support import Tiny

STEPS = 16
LAST = f"step-{STEPS:012d}"
Fault = Callable[[int, str, str], None]


@contextmanager
def at_requests(fault: Fault) -> Iterator[list[tuple[str, str]]]:
    """Inside, ``fault`` gets the number, kind and name of each request; yields the log of them."""
    log: list[tuple[str, str]] = []
    lock = threading.Lock()

    def op(self: Remote, kind: str, name: str) -> None:
        with lock:
            log.append((kind, name))
            number = len(log)
        fault(number, kind, name)

    with mock.patch.object(Remote, "_op", op):
        yield log


def held(url: str) -> dict[str, list[str]]:
    """Verify every checkpoint that the store shows; what is wrong with each, by name."""
    checkpoints = RemoteCheckpoints(open_remote(url)).refresh()
    return {name: checkpoints.problems(name) for name in checkpoints.names()}


def names(url: str) -> list[str]:
    """The names of all files at a URL."""
    return sorted(open_remote(url).find())


def whole(folder: Path) -> list[str]:
    """The whole checkpoints of a run directory on this machine."""
    return sorted(path.parent.name for path in folder.glob("checkpoints/step-*/MANIFEST.json"))


def fit(place, **options) -> Fit:
    given = {
        "steps": STEPS,
        "batch_size": 8,
        "progress": False,
        "loggers": "jsonl",
        "log_every": 2,
        "eval_every": 4,
        "checkpoint": Checkpoint(every=4, keep=2, best="eval/loss:min"),
        "run_dir": place,
    }
    return Fit(**{**given, **options})


def until(step, place, **options):
    """Train from the newest checkpoint to a step, and end there in order."""
    one = fit(place, resume="auto", **options)
    one.on("step_end", lambda run, out: run.stop("here") if run.progress.step == step else None)
    return one.run(Tiny(noisy=True))


class Proxy:
    """Passes HTTP requests on to a server. ``fault`` gets each request's number and what it is.

    It returns "" to pass a request on, a status such as "503" to answer itself, "cut" to close the
    connection before the request is passed on, or "lose" to close it after.
    """

    def __init__(
        self,
        port: int,
        fault: Callable[[int, str], str] = lambda n, what: "",
        address: str = "127.0.0.1",
        own_port: int = 0,
    ) -> None:
        self.fault = fault
        self.log: list[str] = []
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do(self) -> None:
                proxy._pass_on(self, port)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((address, own_port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://{address}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _pass_on(self, request: BaseHTTPRequestHandler, port: int) -> None:
        body = _body(request)
        with self._lock:
            self.log.append(f"{request.command} {request.path}")
            number = len(self.log)
        what = self.fault(number, self.log[number - 1])
        if what.isdigit():
            code = "SlowDown" if what == "503" else "InternalError"
            text = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            _answer(request, int(what), [("Content-Type", "application/xml")], text)
            return
        if what == "cut":
            _cut(request)
            return
        server = http.client.HTTPConnection("127.0.0.1", port)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP}
        server.request(request.command, request.path, body, headers)
        answer = server.getresponse()
        content = answer.read()
        server.close()
        if what == "lose":
            _cut(request)
            return
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in _HOP]
        _answer(request, answer.status, kept, content, answer.getheader("Content-Length"))


_HOP = {"connection", "transfer-encoding", "content-length", "expect", "keep-alive"}


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if "chunked" not in request.headers.get("Transfer-Encoding", ""):
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    parts = []
    while size := int(request.rfile.readline().split(b";")[0], 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    while request.rfile.readline().strip():
        pass
    return b"".join(parts)


def _answer(
    request: BaseHTTPRequestHandler,
    status: int,
    headers: list[tuple[str, str]],
    content: bytes,
    length: str | None = None,
) -> None:
    request.send_response(status)
    for name, value in headers:
        request.send_header(name, value)
    if status not in (204, 304):
        shown = length if request.command == "HEAD" and length else str(len(content))
        request.send_header("Content-Length", shown)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


def _cut(request: BaseHTTPRequestHandler) -> None:
    request.close_connection = True
    with suppress(OSError):
        request.connection.shutdown(socket.SHUT_RDWR)
