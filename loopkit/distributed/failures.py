"""How a rank ends when it fails: it reports the cause once, for all ranks, and exits at once."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple

from loopkit.errors import DataError, HungError, LoopkitError
from loopkit.files import write_file

FailureKind = Literal["local", "propagated", "hang"]

# Seconds that a process waits for another thread, or for another rank to end first.
_GRACE = 3.0
# Texts of the errors that a rank gets when another rank is gone. They do not give the cause.
_PROPAGATED_SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "connectFullMesh", "recvValue failed",
    "Socket Timeout", "NCCL communicator was aborted", "Connection refused", "remote process exited", "Gloo connect",
)  # fmt: skip
_HANG_SIGNS = (
    "Timed out waiting",
    "timed out",
    "Watchdog caught collective operation timeout",
    "wait timeout",
)


class Diagnosis(NamedTuple):
    """What is known of a hang.

    Attributes:
        text: which rank did not come, or cannot be reached.
        cut_off: whether this machine cannot reach the others. A launcher that waits for them may
            never report anything.
    """

    text: str
    cut_off: bool = False


def started_by_launcher() -> bool:
    """Return whether loopkit's own launcher started this process."""
    return "LOOPKIT_LAUNCH" in os.environ


def kind_of(error: BaseException) -> FailureKind:
    """Return what made this rank fail.

    Returns:
        "local" for an error of this rank, "propagated" if another rank has ended, "hang" if other
        ranks did not come to a collective in time.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, DataError):  # also of a worker that timed out
            return "local"
        if isinstance(seen, RuntimeError) and not isinstance(seen, LoopkitError):
            text = str(seen)
            if any(sign in text for sign in _HANG_SIGNS):
                return "hang"
            if any(sign in text for sign in _PROPAGATED_SIGNS):
                return "propagated"
        seen = seen.__cause__ or seen.__context__
    return "local"


class FailureReporter:
    """An excepthook for one of several ranks: it reports the error and exits at once.

    The exit closes the sockets, which frees the ranks that wait for this one.

    Args:
        rank: this process's rank.
        diagnose: called after a hang: kills the ranks of this machine that did not come, and
            returns what is known of them.
    """

    def __init__(self, rank: int, diagnose: Callable[[], Diagnosis]) -> None:
        self.rank = rank
        self.diagnose = diagnose

    def install(self) -> None:
        """Become ``sys.excepthook``."""
        sys.excepthook = self

    def __call__(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Report the error with its traceback and exit."""
        self.exit(error, "".join(traceback.format_exception(kind, error, trace)).rstrip())

    def exit(self, error: BaseException, text: str) -> None:
        """Report ``error``, shown as ``text``, and exit."""
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
        code = error.exit_code if isinstance(error, LoopkitError) else code
        kind, cut_off = kind_of(error), False
        if kind == "hang":
            code = HungError.exit_code
            found, cut_off = self.diagnose()
            text = f"loopkit.errors.HungError: {found}\n{_first_line(error)}"
        self._report(kind, text, code, cut_off=cut_off)
        _wait_for_saves()
        sys.stdout.flush()
        sys.stderr.flush()
        # Other launchers take the rank that ends first for the cause.
        if kind == "propagated" and not started_by_launcher():
            time.sleep(_GRACE)
        os._exit(code)

    def _report(self, kind: FailureKind, text: str, code: int, *, cut_off: bool) -> None:
        if started_by_launcher():
            directory = Path(os.environ["LOOPKIT_LAUNCH"])
            record = {"rank": self.rank, "kind": kind, "text": text, "code": code}
            _write(directory / f"failure-{self.rank}.json", {**record, "at": time.time_ns()})
        elif kind == "propagated":
            print(f"rank {self.rank}: ended, as another rank did", file=sys.stderr)
        elif "TORCHELASTIC_ERROR_FILE" in os.environ and not cut_off:
            # torchrun shows this file last and once.
            details = {
                "py_callstack": f"rank {self.rank}: {text}",
                "timestamp": str(int(time.time())),
            }
            message = {"message": text.splitlines()[-1] if text else "", "extraInfo": details}
            _write(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), {"message": message})
        else:
            print(f"rank {self.rank} failed:\n{text}", file=sys.stderr)


def exit_failed_rank(error: BaseException, text: str) -> None:
    """Report ``error``, shown as ``text``, and exit; return if this process is not a rank."""
    if isinstance(sys.excepthook, FailureReporter):
        sys.excepthook.exit(error, text)


def _write(path: Path, value: dict[str, Any]) -> None:
    """Replace ``path`` at once: its reader may kill this process in the middle of a write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, [json.dumps(value).encode()])


def _first_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0][:300]


def _wait_for_saves() -> None:
    """Let a save in the background end, so that no checkpoint is left half written."""
    for thread in threading.enumerate():
        if thread.name == "loopkit-checkpoint":
            thread.join(_GRACE)
