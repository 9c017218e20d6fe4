"""The program: finds the command, runs it, and turns what went wrong into one line and an exit
code.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TextIO

from loopkit.distributed.failures import exit_failed_rank
from loopkit.errors import LoopkitError, LoopkitWarning, OptionError, nearest
from loopkit.version import __version__

INTERRUPTED = 130

# Commands are imported when they are run, so that help comes without waiting for torch.
COMMANDS = {
    "fit": ("fit", "train a task"),
    "evaluate": ("evaluate", "measure a task on its evaluation data"),
    "predict": ("predict", "write a task's predictions"),
    "ckpt": ("ckpt", "list, verify, compare and export checkpoints"),
    "bench": ("bench.bench", "time and memory of a task by precision, or over a grid of options"),
    "report": ("report", "what a run did, from its files"),
    "convert-args": ("convert_args", "the Fit for a Hugging Face Trainer's arguments"),
    "doctor": ("doctor", "what this machine has: versions, devices, extras"),
}
ALIASES = {
    "train": "fit",
    "eval": "evaluate",
    "test": "evaluate",
    "validate": "evaluate",
    "infer": "predict",
    "checkpoint": "ckpt",
    "checkpoints": "ckpt",
    "benchmark": "bench",
}
USAGE = """usage: loopkit COMMAND [...]

{commands}

loopkit COMMAND --help shows what a command takes; loopkit fit TARGET --help also what the task takes.
TARGET is path/to/file.py, path/to/file.py:Class or package.module:Class.

exit codes: 0 done, 1 error, 2 usage, 65 no checkpoint can be trusted, 73 cannot write, 74 disk full,
75 hung, 130 Ctrl-C, 143 preempted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code. A run that SIGTERM ended raises SystemExit(143).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            return _run(words)
        except LoopkitError as error:
            exit_failed_rank(error, f"loopkit: {error}")
            print(f"loopkit: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("loopkit: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader of our output has gone, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            told = error.with_traceback(_of_the_user(error.__traceback__))
            exit_failed_rank(error, "".join(traceback.format_exception(told)).rstrip())
            traceback.print_exception(told)
            return 1


def _run(words: list[str]) -> int:
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("--help", "-h", "help"):
        print(
            USAGE.format(
                commands="\n".join(f"  {n:<13} {about}" for n, (_, about) in COMMANDS.items())
            ),
            end="",
        )
        return 0 if words else 2
    if name in ("--version", "version"):
        print(f"loopkit {__version__}")
        return 0
    if name not in COMMANDS:
        raise OptionError(_unknown(name))
    command = importlib.import_module(f"loopkit.cli.{COMMANDS[name][0]}")
    code: int = command.run(rest)
    return code


def _unknown(name: str) -> str:
    if name.endswith(".py") or ".py:" in name:
        return f"say what to do with {name}: loopkit fit {name}, or evaluate, or predict"
    if name.startswith("-"):
        return f"give the command first, then its options: {name} came before any of {', '.join(COMMANDS)}"
    hint = f" Did you mean {ALIASES[name]!r}?" if name in ALIASES else nearest(name, COMMANDS)
    return f"there is no command {name!r}.{hint} Commands: {', '.join(COMMANDS)}"


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    where = (
        "loopkit: "
        if issubclass(category, LoopkitWarning)
        else f"{filename}:{lineno}: {category.__name__}: "
    )
    print(f"{where}{message}", file=file or sys.stderr)


def _of_the_user(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from where it leaves the command line and the import system; all of it if it
    never does.
    """
    inner = trace
    while inner is not None:
        file = inner.tb_frame.f_code.co_filename
        if os.path.dirname(__file__) != os.path.dirname(file) and "importlib" not in file:
            return inner
        inner = inner.tb_next
    return trace
