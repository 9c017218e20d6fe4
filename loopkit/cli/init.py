"""``loopkit init``: write a first file, which trains as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loopkit.cli.args.command_parser import CommandParser
from loopkit.errors import OptionError, RunDirError

FIRST = Path(__file__).with_name("first_task.txt")


def run(argv: Sequence[str]) -> int:
    """Write the file; return the exit code."""
    parser = CommandParser(
        "init", "Write a first file with a task, its data and its metrics. It trains as it is."
    )
    parser.add_argument("file", nargs="?", default="moons.py", help="default: %(default)s")
    name = parser.parse_args(argv).file
    path = Path(name)
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise OptionError(f"init: {name} is no name for a Python module: give one such as moons.py")
    text = FIRST.read_text(encoding="utf-8").replace("FILE", name)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RunDirError(
            f"{path} is there already, and is left as it is: give another name"
        ) from None
    except OSError as error:
        raise RunDirError(f"{path} cannot be written: {error.strerror}") from error
    print(
        f"wrote {path}. Now type one of these:\n"
        f"  python {path}\n"
        f"  loopkit fit {path} --epochs 20 --hidden 64\n"
        f"  loopkit fit {path} --help"
    )
    return 0
