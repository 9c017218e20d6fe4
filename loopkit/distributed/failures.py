"""What a rank leaves behind when it fails: who was first, why, and where; told once, however many
ranks there are.
"""

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
from typing import Any

from loopkit.errors import HungError, LoopkitError
from loopkit.files import write_file

_GRACE = 3.0
# What a rank hears when another one is gone; it says nothing of why.
_ECHOES = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "connectFullMesh", "recvValue failed",
    "Socket Timeout", "NCCL communicator was aborted", "Connection refused", "remote process exited", "Gloo connect",
)  # fmt: skip
_TIMEOUTS = (
    "Timed out waiting",
    "timed out",
    "Watchdog caught collective operation timeout",
    "wait timeout",
)


def started_by_launcher() -> bool:
    """Whether loopkit's own launcher started this process."""
    return "LOOPKIT_LAUNCH" in os.environ


def kind_of(error: BaseException) -> str:
    """ "own" for an error of this rank, "echo" of another one's, "hung" where the others never
    came.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, RuntimeError) and not isinstance(seen, LoopkitError):
            text = str(seen)
            if any(sign in text for sign in _TIMEOUTS):
                return "hung"
            if any(sign in text for sign in _ECHOES):
                return "echo"
        seen = seen.__cause__ or seen.__context__
    return "own"


class Failure:
    """The end of this process when an exception leaves it: recorded for whoever started it, then
    out at once.

    Leaving at once closes the sockets, which frees the ranks that wait for this one.

    Args:
        rank: this process's rank.
        diagnose: for a hang, what is known of the ranks that did not come; also ends those of this
            machine.
    """

    def __init__(self, rank: int, diagnose: Callable[[], str]) -> None:
        self.rank = rank
        self.diagnose = diagnose

    def install(self) -> None:
        """Take over ``sys.excepthook``."""
        sys.excepthook = self

    def __call__(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
        text: str | None = None,
    ) -> None:
        """Record and leave; ``text`` is what to show in place of the traceback."""
        code = (
            error.exit_code
            if isinstance(error, LoopkitError)
            else 130
            if kind is KeyboardInterrupt
            else 1
        )
        why = kind_of(error)
        if why == "hung":
            code, text = (
                HungError.exit_code,
                f"loopkit.errors.HungError: {self.diagnose()}\n{_last_line(error)}",
            )
        if text is None:
            text = "".join(traceback.format_exception(kind, error, trace)).rstrip()
        self._tell(why, text, code)
        _end_of_saves()
        sys.stdout.flush()
        sys.stderr.flush()
        if why == "echo" and not started_by_launcher():
            time.sleep(_GRACE)  # a launcher takes the first to end for the cause
        os._exit(code)

    def _tell(self, why: str, text: str, code: int) -> None:
        record = {"rank": self.rank, "why": why, "text": text, "code": code, "at": time.time_ns()}
        if started_by_launcher():
            _write(Path(os.environ["LOOPKIT_LAUNCH"]) / f"failure-{self.rank}.json", record)
        elif why == "echo":
            print(f"rank {self.rank}: ended, as another rank did", file=sys.stderr)
        elif "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun shows it, last and once
            extra = {
                "py_callstack": f"rank {self.rank}: {text}",
                "timestamp": str(int(time.time())),
            }
            message = {"message": text.splitlines()[-1] if text else "", "extraInfo": extra}
            _write(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), {"message": message})
        else:
            print(f"rank {self.rank} failed:\n{text}", file=sys.stderr)


def leave(error: BaseException, text: str) -> None:
    """In one of several ranks: end it by ``error``, of which ``text`` is shown. Returns where there
    is one process.
    """
    hook = sys.excepthook
    if isinstance(hook, Failure):
        hook(type(error), error, error.__traceback__, text)


def _write(path: Path, value: dict[str, Any]) -> None:
    """Replace ``path`` at once: whoever reads it may end this process in the midst of a write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, [json.dumps(value).encode()])


def _last_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0][:300]


def _end_of_saves() -> None:
    """Let a save in the background come to its end; nothing that is whole is left half written."""
    for thread in threading.enumerate():
        if thread.name == "loopkit-checkpoint":
            thread.join(_GRACE)
