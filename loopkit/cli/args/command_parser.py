"""The parser of the commands that run no task: positions and flags, and errors of one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from loopkit.errors import OptionError, nearest


class CommandParser(argparse.ArgumentParser):
    """An argparse parser without abbreviations, whose errors are OptionErrors."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"loopkit {command}", description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise an OptionError; for an unknown flag it names the flag that was probably meant."""
        hint = ""
        if message.startswith("unrecognized arguments: --"):
            wrong = message.partition(": ")[2].split()[0].partition("=")[0]
            hint = nearest(wrong, self._option_string_actions)
        usage = " ".join(self.format_usage().split())
        raise OptionError(f"{self.prog.removeprefix('loopkit ')}: {message}.{hint} {usage}")
