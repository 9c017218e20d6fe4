"""Every example of the pages runs: Python blocks in order, with their output, and commands."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from loopkit.cli.main import main
from tests import fork_server
from tests.docs.pages import DOCS, ROOT, Block, blocks, matches

# In tests/cli, tests/plan and test_first_ten_minutes.py.
RUN_ELSEWHERE = ("cli.md", "plan.md", "first-ten-minutes.md")
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if page.name not in RUN_ELSEWHERE]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Run in a folder that is on sys.path. Forget the modules of that folder afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setenv("NO_COLOR", "1")
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def run_python(block: Block, page, namespace):
    if block.title:
        Path(block.title).write_text(block.text, encoding="utf-8")
    exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)


def run_console(block: Block, capsys):
    """Run each "$ loopkit …" line in this process and each "$ python …" line in a new one."""
    for part in block.text.split("$ ")[1:]:
        command, _, shown = part.partition("\n")
        words = shlex.split(command)
        if words[0] == "python":
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            done = fork_server.run(
                [sys.executable, *words[1:]],
                capture_output=True,
                text=True,
                env=environment,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            assert matches(shown, done.stdout), (
                f"$ {command}\nshown:\n{shown}\nprinted:\n{done.stdout}"
            )
            continue
        assert words[0] == "loopkit", (
            f"a console block runs {words[0]}: only loopkit and python are run here"
        )
        capsys.readouterr()
        code = main(words[1:])
        out, err = capsys.readouterr()
        assert code == 0, err
        assert matches(shown, out), f"$ {command}\nshown:\n{shown}\nprinted:\n{out}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run_and_print_what_it_shows(page, capsys, monkeypatch):
    # A page's file may have the name of a module of tasks/ that an earlier test has imported.
    for path in (ROOT / "tasks").glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    namespace = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        if block.language == "python" and block.runs:
            capsys.readouterr()
            run_python(block, page, namespace)
            printed = capsys.readouterr().out
        elif block.language == "python" and block.title:
            # A later command runs this file.
            Path(block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "text" and block.follows and block.runs:
            assert matches(block.text, printed), (
                f"{page.name}, line {block.line}: printed\n{printed}"
            )
        elif (
            block.language == "console"
            and block.runs
            and block.text.startswith(("$ loopkit", "$ python train"))
        ):
            run_console(block, capsys)
