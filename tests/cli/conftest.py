import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from loopkit.cli.main import main

TASKS = Path(__file__).parent / "tasks"


@dataclass
class Shell:
    """Runs commands in this process, in a folder of their own."""

    capsys: pytest.CaptureFixture

    def __call__(self, *argv):
        """Exit code, stdout, stderr."""
        code = main([str(word) for word in argv])
        out, err = self.capsys.readouterr()
        return code, out, err

    def ok(self, *argv):
        code, out, err = self(*argv)
        assert code == 0, err
        return out

    def refused(self, *argv):
        """The one line of a usage error."""
        code, out, err = self(*argv)
        assert (code, out, err.count("\n")) == (2, "", 1), (code, out, err)
        return err.removeprefix("loopkit: ").rstrip("\n")


@pytest.fixture
def loopkit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(TASKS), *sys.path])
    return Shell(capsys)


@pytest.fixture
def shapes():
    return str(TASKS / "shapes.py")
