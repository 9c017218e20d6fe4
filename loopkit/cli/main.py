"""The program: finds the command, runs it, and turns an error into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from loopkit.distributed.failures import exit_failed_rank
from loopkit.errors import LoopkitError, LoopkitWarning, OptionError, nearest
from loopkit.version import __version__

INTERRUPTED = 130

# The module of each command below loopkit.cli, and what the command does. A module is imported when
# its command runs, so that help does not wait for torch.
COMMANDS = {
    "init": ("init", "write a first file, which trains as it is"),
    "fit": ("fit", "train a task"),
    "resume": ("resume", "continue a run that loopkit fit started"),
    "evaluate": ("evaluate", "measure a task on its evaluation data"),
    "test": ("test", "measure a task on its test data"),
    "predict": ("predict", "write a task's predictions"),
    "eject": ("eject.eject", "write the plain PyTorch script of a run"),
    "lr-find": ("lr_find", "find a learning rate in a short test"),
    "sweep": ("sweep.sweep", "train with several values of some options, and compare"),
    "ckpt": ("ckpt", "list, verify, compare and export checkpoints"),
    "runs": ("runs", "list runs, to sort and to filter"),
    "report": ("report.command", "show what runs did: as text, as JSON or as a page"),
    "plan": ("plan.plan", "foresee the memory of a run on any number of ranks"),
    "bench": ("bench.bench", "measure a task's time and memory, by precision or over a grid"),
    "convert-args": ("convert_args", "turn a Trainer's arguments into a Fit"),
    "doctor": ("doctor", "show what this machine has: versions, devices, extras"),
    "completion": ("completion", "print the shell's completion of commands and options"),
}
ALIASES = {
    "train": "fit",
    "eval": "evaluate",
    "validate": "evaluate",
    "infer": "predict",
    "checkpoint": "ckpt",
    "checkpoints": "ckpt",
    "benchmark": "bench",
    "compare": "report",
    "list": "runs",
    "continue": "resume",
    "new": "init",
    "tune": "lr-find",
}
USAGE = """usage: loopkit COMMAND [...]

{commands}

loopkit COMMAND --help shows the options of a command, and
loopkit fit TARGET --help also the arguments of the task.
TARGET is path/to/file.py, path/to/file.py:Class or package.module:Class.

exit codes: 0 done, 1 error, 2 usage, 65 no checkpoint can be trusted,
73 cannot write, 74 disk full, 75 hung, 130 Ctrl-C, 143 preempted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code. A run that SIGTERM ended raises SystemExit(143).
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        except LoopkitError as error:
            exit_failed_rank(error, f"loopkit: {error}")
            print(f"loopkit: {error}", file=sys.stderr)
            return error.exit_code
        except KeyboardInterrupt:
            print("loopkit: interrupted", file=sys.stderr)
            return INTERRUPTED
        except BrokenPipeError:  # the reader of stdout has gone, as with `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except SyntaxError as error:
            lines = "".join(traceback.format_exception_only(error)).rstrip()
            exit_failed_rank(error, lines)
            print(f"{lines}\nloopkit: {error.filename} is not valid Python", file=sys.stderr)
            return 1
        except Exception as error:
            shown = error.with_traceback(_without_cli(error.__traceback__))
            exit_failed_rank(error, "".join(traceback.format_exception(shown)).rstrip())
            traceback.print_exception(shown)
            return 1


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("--help", "-h", "help"):
        lines = [f"  {command:<13} {about}" for command, (_, about) in COMMANDS.items()]
        print(USAGE.format(commands="\n".join(lines)), end="")
        return 0 if argv else 2
    if name in ("--version", "version"):
        print(f"loopkit {__version__}")
        return 0
    if name not in COMMANDS:
        raise OptionError(_unknown(name))
    command = importlib.import_module(f"loopkit.cli.{COMMANDS[name][0]}")
    code: int = command.run(argv[1:])
    return code


def _unknown(name: str) -> str:
    known = ", ".join(COMMANDS)
    if name.endswith(".py") or ".py:" in name:
        return f"{name} needs a command before it: loopkit fit {name}, or evaluate, or predict"
    if name.startswith("-"):
        return f"give the command first, then its options: {name} came before any of {known}"
    hint = f" Did you mean {ALIASES[name]!r}?" if name in ALIASES else nearest(name, COMMANDS)
    return f"there is no command {name!r}.{hint} Commands: {known}"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    ours = issubclass(category, LoopkitWarning)
    source = "loopkit" if ours else f"{filename}:{lineno}: {category.__name__}"
    print(f"{source}: {message}", file=file or sys.stderr)


def _without_cli(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback without its outer frames in the command line and the import system.

    Where the error comes from the command line itself, all frames stay.
    """
    own = Path(__file__).parent
    inner = trace
    while inner is not None:
        file = inner.tb_frame.f_code.co_filename
        if own not in Path(file).parents and "importlib" not in file:
            return inner
        inner = inner.tb_next
    return trace
