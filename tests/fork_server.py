"""Start Python programs from a process that has torch imported, and only forks for each of them.

Importing torch, its compiler and loopkit takes two seconds of a CPU in each process; a fork takes 20 ms.
A forked program is a real process, and a child of the process that asked for it: it has its own pid,
signals, pipes and exit code, its command line is what ``ps`` shows, and its interpreter ends as any other.
``Popen`` and ``run`` are those of ``subprocess``. Inside a forked program ``subprocess`` itself forks, so
that the launcher under test gets its ranks this way too.

A server forks before any thread or tensor exists. Programs that must be started for real use ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import io
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any
from unittest import mock

import loopkit

ROOT = Path(__file__).parents[1]
OTHERS = ("torch._dynamo", "torch.distributed.fsdp", "torch.profiler", "filelock", "tensorboardX")
LONGEST_COMMAND_LINE = 4096
PR_SET_CHILD_SUBREAPER = 36
# The original class: later code replaces ``subprocess.Popen``.
ExecutingPopen = subprocess.Popen


class Server:
    """A server that belongs to this process: started at the first request, with ``imports`` imported too."""

    def __init__(self, *imports: str) -> None:
        self.imports = imports
        self.connection: socket.socket | None = None

    def fork(self, files: list[int], **program: Any) -> int:
        """Have ``program`` started with ``files`` as its stdin, stdout and stderr; its pid."""
        connection = self.connection or self.start()
        socket.send_fds(connection, [json.dumps(program).encode()], files)
        answer = connection.recv(64)
        if not answer:
            raise RuntimeError("the fork server has ended; what it printed says why")
        return int(answer)

    def start(self) -> socket.socket:
        """Start the server."""
        adopt_orphans()
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        words = [sys.executable, "-m", "tests.fork_server", str(theirs.fileno()), *self.imports]
        room = " " * LONGEST_COMMAND_LINE  # each fork writes its own command line over this one
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = ExecutingPopen(
            [*words, room], cwd=ROOT, env=environment, pass_fds=[theirs.fileno()]
        )
        theirs.close()
        return self.connection


server = Server()


class Popen(ExecutingPopen):
    """``subprocess.Popen`` that forks Python programs; whatever else is executed as usual."""

    server = server

    def _execute_child(self, *args: Any) -> None:
        given = inspect.signature(super()._execute_child).bind(*args).arguments
        words = (
            list(map(os.fspath, given["args"])) if isinstance(given["args"], (list, tuple)) else []
        )
        if sys.platform != "linux" or words[:1] != [sys.executable]:
            super()._execute_child(*args)
            return
        pipes = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        self.pid = self.server.fork(
            [inherited if pipe == -1 else pipe for inherited, pipe in enumerate(pipes)],
            words=words,
            directory=os.fspath(given["cwd"] or os.getcwd()),
            environment=dict(os.environ if given["env"] is None else given["env"]),
            new_session=given["start_new_session"],
        )
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[end] for end in ends))


def run(*args: Any, popen: type[Popen] = Popen, **kwargs: Any) -> subprocess.CompletedProcess[Any]:
    """``subprocess.run`` by way of ``popen``."""
    with mock.patch.object(subprocess, "Popen", popen):
        return subprocess.run(*args, **kwargs)


def adopt_orphans() -> None:
    """Become the parent of descendants that lose theirs: of what a server's child forks."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def serve(connection: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns in the forked process alone, with the program to run."""
    while True:
        request, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
        if not request:
            os._exit(0)
        pid_read, pid_written = os.pipe()
        adopted, not_yet = os.pipe()
        if between := os.fork():
            # The process between ends at once, which gives its child to whoever adopts orphans.
            os.waitpid(between, 0)
            connection.send(os.read(pid_read, 64))
            for file in (pid_read, pid_written, adopted, not_yet, *files):
                os.close(file)
            continue
        if child := os.fork():
            os.write(pid_written, str(child).encode())
            os._exit(0)
        os.close(not_yet)
        os.read(
            adopted, 1
        )  # ends when the server closes its copy: a program may ask for its parent
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in (pid_read, pid_written, adopted, *files):
            os.close(file)
        return json.loads(request)


def serve_nested(program: dict[str, Any]) -> dict[str, Any]:
    """Give a forked program a server of its own; returns in the program and in what it has forked."""
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    adopt_orphans()
    if os.fork():
        theirs.close()
        server.connection = mine
        return program
    mine.close()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in range(3):  # whoever reads what the program prints waits for the program alone
        os.dup2(nowhere, file)
    os.close(nowhere)
    return serve(theirs)


def become(program: dict[str, Any]) -> list[str]:
    """Make this process what an interpreter is before its program; returns what to run."""
    words = sys.orig_argv = program["words"]
    title_process(words)
    os.environ.clear()
    os.environ.update(program["environment"])
    os.chdir(program["directory"])
    if program["new_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    subprocess.Popen = Popen  # type: ignore[misc]
    sys.modules["numpy"].random.seed()
    unbuffered = words[1] == "-u"
    for name, file in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, opened(getattr(sys, name), file, unbuffered))
    return words[2 if unbuffered else 1 :]


def opened(old: io.TextIOWrapper, file: int, unbuffered: bool) -> io.TextIOWrapper:
    """A stream over ``file`` that is buffered as a new interpreter would."""
    raw = open(file, "wb", buffering=0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(
        raw,
        encoding=old.encoding,
        errors=old.errors,
        line_buffering=os.isatty(file) or file == 2,
        write_through=unbuffered,
    )


def title_process(words: list[str]) -> None:
    """Write ``words`` over this process's command line, for ``ps``."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])
    line = b"\0".join(map(os.fsencode, words))[: end - start - 1]
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


def interpret(words: list[str]) -> None:
    """Run ``words`` as ``python words`` does."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in given if path]
    kind, rest = words[0], words[1:]
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind in ("-c", "-"):
        source, name = (rest[0], "<string>") if kind == "-c" else (sys.stdin.read(), "<stdin>")
        sys.argv = [kind, *rest[kind == "-c" :]]
        sys.path.insert(0, "")
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(source, name, "exec"), vars(module))
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
        runpy.run_path(kind, run_name="__main__")


def interpreted(words: list[str]) -> int:
    """Run ``words`` to the end of its threads and exit handlers; the exit code.

    As an interpreter ends, but for what it frees last: that takes a quarter of a second.
    """
    code: object = 0
    try:
        interpret(words)
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    if not isinstance(code, int):
        if code is not None:
            print(code, file=sys.stderr)
        code = int(code is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError, ValueError):
            stream.flush()
    return code


def main(connection: str, *imports: str) -> None:
    """Serve; in a forked process, run its program."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ours = [module.name for module in pkgutil.walk_packages(loopkit.__path__, "loopkit.")]
    for name in (*OTHERS, *ours, *imports[:-1]):
        with contextlib.suppress(ImportError):  # an optional package
            importlib.import_module(name)
    given = {sys.path[0], *os.environ.get("PYTHONPATH", "").split(os.pathsep)}
    sys.path[:] = [path for path in sys.path if path not in given]
    gc.collect()
    gc.freeze()  # a collection in a forked process looks at its own objects, and copies no page
    program = serve(socket.socket(fileno=int(connection)))
    while (forked := serve_nested(program)) is not program:
        program = forked
    code = interpreted(become(program))
    if code < 0:  # as an interpreter that was interrupted
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    from tests import fork_server  # under its name, where forked programs find it too

    fork_server.main(*sys.argv[1:])
