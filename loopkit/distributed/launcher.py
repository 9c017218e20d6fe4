"""Start the ranks that a plain ``python train.py`` asks for, and end with the first that fails.

Each rank runs the same script from the start, with torchrun's environment, so a script is written
once for all launchers. The process that the user started only watches: it never returns from
``Fit``, and ends with the exit code of the ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import IO, Any

from loopkit.distributed.environment import ONE_MACHINE, NodeInfo
from loopkit.distributed.launch_directory import launch_directory
from loopkit.errors import OptionError

# All in seconds.
_POLL_INTERVAL = 0.02
_TIME_TO_REPORT = 2.0
_TIME_TO_STOP = 30.0


def relaunch_command() -> list[str] | None:
    """Return the command that starts this program again.

    Returns:
        None if there is no script: in an interactive session, a notebook or ``python -c``.

    Raises:
        OptionError: the program is Ray's, which has called the user's function.
    """
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return [sys.executable, "-u", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    script = getattr(main, "__file__", None)
    if script is None or not os.path.exists(script):
        return None
    if "ray" in sys.modules and os.path.basename(script) == "default_worker.py":
        raise OptionError(
            "this process is a worker of Ray, and several devices need several: give the function to "
            "TorchTrainer(..., scaling_config=ScalingConfig(num_workers=2)), or pass devices=1"
        )
    return [sys.executable, "-u", os.path.abspath(script), *sys.argv[1:]]


def ending_signals() -> list[int]:
    """Return the signals that end a run in order: SIGINT, SIGTERM, and SIGHUP if it has an effect.

    Under nohup SIGHUP has none.
    """
    numbers: list[int] = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return numbers


def launch(count: int, command: Sequence[str], node: NodeInfo = ONE_MACHINE) -> int:
    """Run ``command`` as ``count`` ranks on this machine, and watch them to their end.

    SIGTERM, SIGHUP, SIGINT and SIGUSR1 are forwarded to the ranks, once each. When a rank fails, the others
    get two seconds to report and are then killed. The traceback shown is that of the earliest local
    failure.

    Returns:
        The exit code: 0, or that of the failure.
    """
    sys.stdout.flush()
    # Held here, the store outlives any rank. On one machine the system chooses its port.
    store = hold_store(node.host, node.port) if node.node_rank == 0 else None
    with launch_directory() as directory:
        port = store.port if store else None
        ranks = RankProcesses(command, count, directory, port=port, node=node)
        try:
            with ranks.forwarding_signals():
                return ranks.watch()
        finally:
            ranks.kill()


def hold_store(host: str, port: int) -> Any:
    """Return a store that this process holds.

    Args:
        host: a name or address of this machine.
        port: where to listen; 0 takes a free port.

    Raises:
        OptionError: the port is taken.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise OptionError(port_is_taken(port)) from error


def port_is_taken(port: int) -> str:
    """Return an error text: another process has the port where the ranks are to meet."""
    return (
        f"port {port}, where the ranks are to meet, is taken by another process on this machine, "
        "perhaps another job: set MASTER_PORT to a free one for all ranks"
    )


class RankProcesses:
    """The processes of one launch.

    Args:
        command: what each rank runs.
        count: the number of ranks.
        directory: where ranks write failure records, and all but rank 0 their stderr.
        port: of the store where the ranks meet; None takes that of ``node``.
        node: which machine this is, of how many.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        directory: Path,
        *,
        port: int | None,
        node: NodeInfo = ONE_MACHINE,
    ) -> None:
        self.directory = directory
        self._stopping_since: float | None = None
        threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
        self._first, self._nodes = node.node_rank * count, node.nodes
        shared = {
            "WORLD_SIZE": count * node.nodes,
            "LOCAL_WORLD_SIZE": count,
            "MASTER_ADDR": node.host,
            "MASTER_PORT": port or node.port,
            "OMP_NUM_THREADS": threads,
            "LOOPKIT_LAUNCH": directory,
            "LOOPKIT_PARENT": os.getpid(),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        for local_rank in range(count):
            rank = self._first + local_rank
            env = {**os.environ, **{name: str(value) for name, value in shared.items()}}
            env |= {"RANK": str(rank), "LOCAL_RANK": str(local_rank)}
            # What a script prints shows once. Each rank has a session of its own, so that Ctrl-C
            # reaches it once, through this process.
            stderr: IO[bytes] | None = None if rank == 0 else self._stderr_of(rank).open("wb")
            silent = {} if rank == 0 else {"stdout": subprocess.DEVNULL, "stderr": stderr}
            self.processes.append(
                subprocess.Popen(command, env=env, start_new_session=True, **silent)  # type: ignore[call-overload]
            )
            if stderr is not None:
                stderr.close()

    def _stderr_of(self, rank: int) -> Path:
        return self.directory / f"stderr-{rank}"

    @contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Inside, the signals that this process gets go to the ranks."""

        def forward(number: int, frame: FrameType | None) -> None:
            self.forward_signal(number)

        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            numbers = ending_signals()
            numbers += [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
            before = {number: signal.signal(number, forward) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def forward_signal(self, number: int) -> None:
        """Send a signal to every rank that still runs."""
        if number != getattr(signal, "SIGUSR1", None) and self._stopping_since is None:
            self._stopping_since = time.monotonic()
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """Kill the ranks that still run."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()

    def watch(self) -> int:
        """Wait until all ranks have ended; report a failure and return the exit code."""
        first: int | None = None
        failed_at = 0.0
        while True:
            codes = [process.poll() for process in self.processes]
            failed = [number for number, code in enumerate(codes) if code]
            if first is None and failed:
                first, failed_at = failed[0], time.monotonic()
            if None not in codes:
                break
            limit = _TIME_TO_REPORT if self._stopping_since is None else _TIME_TO_STOP
            if first is not None and time.monotonic() - failed_at > limit:
                self.kill()
                break
            time.sleep(_POLL_INTERVAL)
        return 0 if first is None else self._report(first, codes)

    def _report(self, first: int, codes: list[int | None]) -> int:
        """Print the cause of the failure and return its exit code.

        Args:
            first: the local rank that was seen to end first.
            codes: the exit code of each local rank; None where this process killed the rank.
        """
        paths = sorted(self.directory.glob("failure-*.json"))
        records = [json.loads(path.read_text()) for path in paths]
        # The rank that finds a hang kills the rank that it waits for, so its record comes first.
        hangs = [record for record in records if record["kind"] == "hang"]
        causes = hangs or [record for record in records if record["kind"] == "local"]
        if hangs or (causes and not (codes[first] or 0) < 0):
            cause = min(causes, key=lambda record: record["at"])
            print(f"rank {cause['rank']} failed:\n{cause['text']}", file=sys.stderr)
            return int(cause["code"])
        reported = {record["rank"] - self._first for record in records}
        ended = [rank for rank in (first, *range(len(codes))) if codes[rank] is not None]
        rank = next((rank for rank in ended if rank not in reported), first)
        code = codes[rank] or 0
        # A rank that ends itself, as SystemExit(143) does, has printed why.
        if code > 0 and not records:
            return code
        if rank in reported and code > 0 and self._nodes > 1:
            others = "one on another machine did; its messages are there"
            print(f"rank {self._first + rank}: ended, as {others}", file=sys.stderr)
        else:
            self._report_unexplained(self._first + rank, code)
        return 128 - code if code < 0 else code or 1

    def _report_unexplained(self, rank: int, code: int) -> None:
        """Print the end of a rank that left no record, after the last lines of its stderr."""
        stderr = self._stderr_of(rank)
        text = stderr.read_text(errors="replace") if stderr.exists() else ""
        if code < 0:
            end = f"was ended by signal {signal.Signals(-code).name}"
        else:
            end = f"ended with exit code {code} while the others continued"
        hint = " (out of memory ends a process like this)" if code == -9 else ""
        lines = [*text.strip().splitlines()[-30:], f"rank {rank} {end}{hint}"]
        print("\n".join(lines), file=sys.stderr)


def die_with_parent() -> None:
    """Have Linux kill this process when its launcher is gone, however the launcher ended."""
    parent = os.environ.get("LOOPKIT_PARENT")
    if parent is not None and sys.platform == "linux":
        # The 1 is PR_SET_PDEATHSIG.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # The launcher may have gone before the call.
        if os.getppid() != int(parent):
            os._exit(1)
