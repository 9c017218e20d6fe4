"""The first page is typed as it says, in an empty folder: files, commands, Ctrl-C."""

from __future__ import annotations

import os
import re
import shlex
import signal
import site
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import fork_server
from tests.docs.pages import DOCS, ROOT, blocks, matches

PAGE = DOCS / "first-ten-minutes.md"
PRESSED = "^C\n"


class Person:
    """Somebody who types the page into a shell.

    Args:
        folder: where.
        programs: what the shell runs for "python" and for "loopkit".
        popen: starts a program.
    """

    def __init__(
        self,
        folder: Path,
        programs: Mapping[str, Sequence[str]],
        popen: Any,
        environment: Mapping[str, str],
    ) -> None:
        self.folder, self.programs, self.popen = folder, programs, popen
        self.environment = {**environment, "OMP_NUM_THREADS": "1"}

    def type_page(self) -> int:
        """Type all blocks; return how many commands there were."""
        count = 0
        for block in blocks(PAGE):
            if block.title:
                (self.folder / block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "console":
                for part in block.text.split("$ ")[1:]:
                    command, _, shown = part.partition("\n")
                    self.type(command, shown)
                    count += 1
        return count

    def type(self, command: str, shown: str) -> None:
        """Run a command, press Ctrl-C where the page does, and compare what comes."""
        words = shlex.split(command)
        reader, writer = os.pipe()
        process = self.popen(
            [*self.programs[words[0]], *words[1:]],
            stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, cwd=self.folder, env=self.environment,
        )  # fmt: skip
        os.close(writer)
        printed, before = "", shown.partition(PRESSED)[0] if PRESSED in shown else None
        with open(reader, encoding="utf-8") as lines:
            for line in lines:
                printed += line
                if before is not None and matches(before.rstrip("\n…") + "…", printed):
                    process.send_signal(signal.SIGINT)
                    before = None
        code = process.wait(timeout=60)
        assert before is None, f"$ {command}\nnever came to ^C:\n{printed}"
        assert code == (130 if PRESSED in shown else 0), f"$ {command}\n{printed}"
        expected = shown.replace(f"{PRESSED}…\n", "")
        assert matches(expected, printed), f"$ {command}\nshown:\n{expected}\nprinted:\n{printed}"


def test_the_page_can_be_typed_in_an_empty_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "import sys; from loopkit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    programs = {"python": [sys.executable], "loopkit": [sys.executable, "-c", script]}
    person = Person(tmp_path, programs, fork_server.Popen, environment)
    assert person.type_page() == PAGE.read_text(encoding="utf-8").count("\n$ ")


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_page_can_be_typed_with_a_wheel_in_a_fresh_environment(tmp_path):
    """All but the packages that loopkit needs: those are this environment's, not downloaded again."""

    def run(*command: str) -> None:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    pip = ("-m", "pip", "--disable-pip-version-check", "-q")
    run(sys.executable, *pip, "wheel", "--no-deps", "-w", str(tmp_path / "wheels"), str(ROOT))
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    run(sys.executable, "-m", "venv", str(tmp_path / "env"))
    python = str(tmp_path / "env/bin/python")
    run(python, *pip, "install", "--no-deps", str(wheel))
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "zz_needed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    folder = tmp_path / "first"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(
        [python, "-c", "import loopkit; print(loopkit.__file__)"],
        capture_output=True, text=True, cwd=folder, env=environment, check=True,
    ).stdout  # fmt: skip
    assert said.startswith(str(tmp_path / "env"))
    programs = {"python": [python], "loopkit": [str(tmp_path / "env/bin/loopkit")]}
    Person(folder, programs, subprocess.Popen, environment).type_page()


def test_the_page_says_where_each_block_is_typed():
    text = PAGE.read_text(encoding="utf-8")
    for block in blocks(PAGE):
        if block.language == "python":
            assert block.title
            assert re.search(rf"Put this into[^.]*`{re.escape(block.title)}`", text)
            assert 'if __name__ == "__main__":' in block.text
