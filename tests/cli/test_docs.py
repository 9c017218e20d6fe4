"""The page on the command line: every command on it is run, and what it prints is compared."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from loopkit.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
EXIT_CODES = {"loopkit ckpt diff": 1, "--epohcs": 2, "--num_train_epochs": 2, "--hidden wide": 2}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def commands():
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, shown = part.partition("\n")
            yield command, shown


def matches(shown, printed):
    """Whether ``printed`` is what the page shows; "…" is any text, and how wide a column is does
    not count.
    """
    pattern = re.escape(re.sub(" +", " ", shown)).replace("…", ".+")
    return re.fullmatch(pattern, re.sub(" +", " ", printed), flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """A folder with the page's file, forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "points.py").write_text(blocks("python")[0])
    yield
    sys.modules.pop("points", None)


def test_every_command_prints_what_the_page_shows(tmp_path, capsys, forks):
    count = 0
    for command, shown in commands():
        words = shlex.split(command)
        out_file = words[words.index(">") + 1] if ">" in words else None
        code = main(words[1 : words.index(">")] if out_file else words[1:])
        out, err = capsys.readouterr()
        if out_file:
            (tmp_path / out_file).write_text(out)
            out = ""
        assert code == next((code for part, code in EXIT_CODES.items() if part in command), 0), (
            command,
            err,
        )
        printed = out or ("" if "fit" in words and code == 0 else err)
        assert matches(shown, printed) or matches(shown, printed + "\n"), (command, printed)
        count += 1
    assert count == PAGE.count("\n$ loopkit")


def test_the_config_on_the_page_is_read(loopkit, tmp_path):
    (tmp_path / "run.yaml").write_text(blocks("yaml")[0])
    text = loopkit.ok("fit", "points.py", "--config", "run.yaml", "--print-config")
    printed = yaml.safe_load(text)
    assert printed["task"]["lr"] == 0.001
    assert printed["hooks"][0]["init_args"]["path"] == "losses.png"
    assert printed["checkpoint"]["best"] == "eval/loss:min"
