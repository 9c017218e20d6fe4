"""The arguments of the commands that run no task: positions and flags, with an error of one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from loopkit.errors import OptionError, nearest


class Arguments(argparse.ArgumentParser):
    """An argparse parser without abbreviations that raises what it has to say."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raise an OptionError, with the flag that was probably meant."""
        hint = ""
        if message.startswith("unrecognized arguments: "):
            wrong = message.partition(": ")[2].split()[0].partition("=")[0]
            hint = nearest(wrong, self._option_string_actions) if wrong.startswith("-") else ""
        raise OptionError(
            f"{self.prog.removeprefix('loopkit ')}: {message}.{hint} "
            f"{' '.join(self.format_usage().split())}"
        )
