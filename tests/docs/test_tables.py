"""Claims of the pages agree with the code: options, names, linked tests, events, errors."""

import ast
import inspect
import pkgutil
import re
import subprocess
import sys

import pytest

import loopkit
from benchmarks import page as benchmarks_page
from benchmarks import record
from loopkit import errors, hooks
from loopkit.errors import LoopkitError
from loopkit.events import EVENTS
from loopkit.foreign_names import TRAINER_NAMES, Reason
from loopkit.loggers.registry import LOGGERS
from tests.docs import architecture_picture, options_table
from tests.docs.pages import DOCS, ROOT, rows_of
from tests.rules.test_rules import LAYERS


def test_the_page_on_options_is_what_the_code_says():
    page = options_table.PAGE.read_text(encoding="utf-8")
    assert page == options_table.written(page), (
        "to update it, run: python -m tests.docs.options_table"
    )


ROWS = [row for page in ("from-trainer.md", "from-lightning.md") for row in rows_of(DOCS / page)]


@pytest.mark.parametrize("theirs", TRAINER_NAMES)
def test_a_name_that_fit_knows_is_in_a_table_beside_ours(theirs):
    beside = [cells[1] for cells in ROWS if theirs in re.findall(r"`(\w+)", cells[0])]
    assert beside, f"{theirs} has no row"
    if isinstance(TRAINER_NAMES[theirs], Reason):
        return
    ours = re.match(r"[\w.]+", TRAINER_NAMES[theirs])[0].rpartition(".")[2]
    assert ours == "the" or any(ours in cell for cell in beside), (ours, beside)


def test_every_argument_of_the_installed_trainer_has_a_row():
    arguments = pytest.importorskip("transformers").TrainingArguments.__dataclass_fields__
    listed = {
        name
        for cells in rows_of(DOCS / "from-trainer.md")
        for name in re.findall(r"`(\w+)", cells[0])
    }
    assert not arguments.keys() - listed


def test_every_argument_and_callback_of_lightning_has_a_row():
    pl = pytest.importorskip("lightning.pytorch")
    page = DOCS / "from-lightning.md"
    listed = {name for row in rows_of(page) for cell in row for name in re.findall(r"`(\w+)", cell)}
    assert not {*inspect.signature(pl.Trainer.__init__).parameters} - listed - {"self"}
    bases = {"Callback", "Checkpoint"}  # of one's own callbacks
    text = page.read_text(encoding="utf-8")
    assert "`LambdaCallback`" in text
    assert not {*pl.callbacks.__all__} - listed - bases - {"LambdaCallback"}
    hooks = {
        n for n in vars(pl.core.hooks.ModelHooks) if n.startswith("configure_") or n == "backward"
    }
    assert not [name for name in hooks - {"configure_model"} if f"`{name}`" not in text]


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


@pytest.mark.parametrize("file", sorted({file for _, file in LINKED}))
def test_a_test_that_the_coverage_links_to_exists(file):
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {test for test, linked in LINKED if linked == file} <= there


def test_every_row_of_the_coverage_is_done_with_a_test_or_not_yet():
    for *_, status in rows_of(COVERAGE):
        if status == "status":
            continue
        assert re.match(r"(done|in part|not yet)\b", status), status
        assert ("](../tests/" in status) == (not status.startswith("not yet")), status


REFERENCE = "\n".join(page.read_text("utf-8") for page in sorted(DOCS.glob("reference/*.md")))
OBJECTS = re.findall(
    r"^::: ([\w.]+)(?:\n    options: .*members: \[(.*)\])?", REFERENCE, re.MULTILINE
)


@pytest.mark.parametrize(("name", "members"), OBJECTS, ids=lambda value: value)
def test_the_reference_names_objects_that_exist(name, members):
    found = pkgutil.resolve_name(name)
    for member in filter(None, members.split(", ")):
        assert hasattr(found, member), member


def test_the_reference_has_every_hook_error_and_logger():
    named = {name.rpartition(".")[2] for name, _ in OBJECTS}
    family = {
        name
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, (LoopkitError, Warning))
    }
    loggers = {kind for _, kind in LOGGERS.values()}
    assert not {*hooks.__all__, *family, *loggers, *loopkit.__all__} - named - {
        "all_gather", "is_rank_zero", "rank_zero_first", "rank_zero_only",
    }  # fmt: skip


def test_the_page_on_benchmarks_shows_the_results_on_disk():
    text = record.PAGE.read_text(encoding="utf-8")
    assert text == benchmarks_page.render(record.results())


def test_the_architecture_shows_the_rooms_and_imports_of_the_source():
    page = architecture_picture.PAGE.read_text(encoding="utf-8")
    assert page == architecture_picture.written(page), (
        "to update it, run: python -m tests.docs.architecture_picture"
    )


def test_the_picture_shows_an_import_that_points_up(monkeypatch):
    name, lowest = "run", LAYERS[0]
    moved = (lowest | {name}, *(layer - {name} for layer in LAYERS[1:]))
    before = architecture_picture.picture()
    monkeypatch.setattr(architecture_picture, "LAYERS", moved)
    assert architecture_picture.picture() != before


def test_the_lifecycle_is_that_of_a_new_trace():
    code = "from tests.docs import lifecycle_trace; print(lifecycle_trace.page(), end='')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (DOCS / "lifecycle.md").read_text(encoding="utf-8") == done.stdout, (
        "to update it, run: python -m tests.docs.lifecycle_trace"
    )


def test_the_architecture_says_where_things_are():
    page = architecture_picture.PAGE.read_text(encoding="utf-8")
    rows = page.split("| question | module |")[1].split("\n\n")[0]
    paths = re.findall(r"`([\w/]+(?:\.py|/))`", rows)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / "loopkit" / path).exists(), path


PAGES = [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_of_a_page_is_one_table(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    fenced, width = False, None
    for number, line in enumerate(lines):
        fenced ^= line.lstrip().startswith("```")
        if fenced or not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) - 1
        if width is None:  # the first row of a table; the second one has dashes alone
            assert not re.search(r"\|\s*\|", line), f"line {number + 1} has an empty head"
            assert re.fullmatch(r"\|[-:| ]+\|", lines[number + 1]), f"line {number + 1} has no head"
            width = cells
        assert cells == width, f"line {number + 1} has {cells} cells, the head has {width}"
