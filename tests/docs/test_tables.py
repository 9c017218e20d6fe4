"""What the pages claim is compared with the code: options, names, tests that are linked to,
commands, errors.
"""

import ast
import inspect
import re

import pytest

from loopkit import errors
from loopkit.errors import LoopkitError
from loopkit.events import EVENTS
from loopkit.foreign_names import TRAINER_NAMES, Reason
from tests.docs import options_table
from tests.docs.pages import DOCS, ROOT, rows_of
from tests.rules.test_rules import LAYERS


def test_the_page_on_options_is_what_the_code_says():
    page = options_table.PAGE.read_text(encoding="utf-8")
    assert page == options_table.written(page), "write it anew: python -m tests.docs.options_table"


ROWS = [row for page in ("from-trainer.md", "from-lightning.md") for row in rows_of(DOCS / page)]


@pytest.mark.parametrize("theirs", TRAINER_NAMES)
def test_a_name_that_fit_knows_stands_in_a_table_with_what_fit_says(theirs):
    beside = [cells[1] for cells in ROWS if theirs in re.findall(r"`(\w+)", cells[0])]
    assert beside, f"{theirs} has no row"
    if isinstance(TRAINER_NAMES[theirs], Reason):
        return
    ours = re.match(r"[\w.]+", TRAINER_NAMES[theirs])[0].rpartition(".")[2]
    assert ours == "the" or any(ours in cell for cell in beside), (ours, beside)


def test_every_argument_of_the_installed_trainer_has_a_row():
    arguments = pytest.importorskip("transformers").TrainingArguments.__dataclass_fields__
    told = {
        name
        for cells in rows_of(DOCS / "from-trainer.md")
        for name in re.findall(r"`(\w+)", cells[0])
    }
    assert not arguments.keys() - told


def test_every_event_is_in_the_table_once():
    cells = [cells[0] for cells in rows_of(DOCS / "hooks.md") if cells[0].startswith("`on_")]
    assert sorted(re.match(r"`on_(\w+)", cell)[1] for cell in cells) == sorted(EVENTS)


def test_every_error_is_on_its_page_with_its_exit_code():
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    family = [
        e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, LoopkitError)
    ]
    assert len(family) > 10
    for error in family:
        assert re.search(
            rf"^\| `{error.__name__}` .*\| {error.exit_code} \|$", page, flags=re.MULTILINE
        ), error.__name__


COVERAGE = DOCS / "coverage.md"
LINKED = re.findall(
    r"\[(test_\w+)\]\(\.\./(tests/[\w/]+\.py)\)", COVERAGE.read_text(encoding="utf-8")
)


def test_every_link_to_a_test_names_it():
    assert len(LINKED) == COVERAGE.read_text(encoding="utf-8").count("](../tests/") > 50


@pytest.mark.parametrize(("test", "file"), sorted(set(LINKED)), ids=lambda value: value)
def test_a_test_that_the_coverage_links_to_exists(test, file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert any(isinstance(node, ast.FunctionDef) and node.name == test for node in tree.body)


def test_every_row_of_the_coverage_is_done_with_a_test_or_not_yet():
    for *_, status in rows_of(COVERAGE):
        if status == "status":
            continue
        assert re.match(r"(done|in part|not yet)\b", status), status
        assert ("](../tests/" in status) == (not status.startswith("not yet")), status


def test_the_architecture_names_every_room_and_no_other():
    text = (
        (DOCS / "architecture.md").read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    )
    told = set(re.findall(r"^  ([\w/.]+)", text, flags=re.MULTILINE))
    package = ROOT / "loopkit"
    files = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    assert told - {"loopkit/"} == files | {
        f"{path.parent.name}/" for path in package.glob("*/__init__.py")
    }


def test_the_architecture_has_the_layers_that_the_rules_enforce():
    text = (
        (DOCS / "architecture.md").read_text(encoding="utf-8").split("```text\n")[2].split("```")[0]
    )
    told = [set(line.split()) for line in text.splitlines()]
    assert told[::-1] == [layer - {"__main__", "__init__"} for layer in LAYERS]
