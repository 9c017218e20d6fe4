"""Every package that loopkit imports is declared in pyproject.toml, and the reverse."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

# Packages with a module of another name.
MODULES = {
    "PyYAML": "yaml",
    "Jinja2": "jinja2",
    "scikit_learn": "sklearn",
    "mlflow_skinny": "mlflow",
}
# Extras for work on loopkit itself, its documentation and its examples.
TOOLS = {"docs", "dev", "bench", "examples", "all"}
# Declared packages that no code of loopkit imports, with the reason.
NOT_IMPORTED = {
    "tensorboard": "the program that users start to see what the logger writes",
    "tokenizers": "transformers imports it, for the tokenizer that goes beside exported weights",
    "datasets": "a task returns its Datasets, of which loopkit uses only what every Dataset has",
    "accelerate": "transformers imports it to load quantised models",
    "webdataset": "a task returns its streams, of which loopkit reads the names of the stages",
    "torchdata": "a task returns its loaders, of which loopkit uses only their state",
}


def required(requirements: list[str]) -> set[str]:
    """The modules of requirements such as ``"PyYAML>=6.0"``; references to loopkit's extras are left out."""
    names = {re.match(r"[\w.-]+", line)[0].replace("-", "_") for line in requirements}
    return {MODULES.get(name, name) for name in names if name != PROJECT["name"].replace("-", "_")}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that Python source imports: anywhere, or by a name that loopkit imports later."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            # A logger imports its service's client by this name.
            if "package" in map(ast.unparse, node.targets) and node.value.value:
                yield str(node.value.value)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"[a-z]\w*(\.\w+)+", str(node.value)):
            yield str(node.value)  # the path of a class, such as "schedulefree.AdamWScheduleFree"


def test_the_search_finds_imports_at_the_top_in_functions_and_by_name():
    source = (
        "import a.b\nfrom c import d\nfrom . import e\ndef f():\n    import g\n"
        "class H:\n    name = package = 'i'\nPATHS = {'x': 'j.K'}\ntext = 'l m'\n"
    )
    assert set(imported(ast.parse(source))) == {"a.b", "c", "g", "i", "j.K"}


BASE = required(PROJECT["dependencies"])
OPTIONAL = {name: required(lines) for name, lines in EXTRAS.items() if name not in TOOLS}
DECLARED = BASE.union(*OPTIONAL.values())


@cache
def imports_of_loopkit() -> tuple[set[str], set[str]]:
    """Return the top-level modules of loopkit's import statements, and those of ``imported``."""
    statements: set[str] = set()
    found: set[str] = set()
    for path in (ROOT / "loopkit").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        statements |= {name.split(".")[0] for node in nodes for name in imported(node)}
        found |= {name.split(".")[0] for name in imported(tree)}
    return statements, found


def test_what_is_imported_is_declared():
    statements, _ = imports_of_loopkit()
    undeclared = statements - set(sys.stdlib_module_names) - {"loopkit"} - DECLARED
    assert not undeclared, "add them to the dependencies in pyproject.toml, or to an extra"


@pytest.mark.parametrize("module", sorted(DECLARED))
def test_what_is_declared_is_imported_or_has_a_reason(module):
    _, found = imports_of_loopkit()
    if module in NOT_IMPORTED:
        assert module not in found, f"{module} is imported now: remove its reason"
    else:
        assert module in found, f"{module} is not imported: remove it, or give the reason"


def test_a_reason_is_given_for_declared_packages_alone():
    assert set(NOT_IMPORTED) <= DECLARED


def test_all_installs_every_extra_of_use():
    (line,) = EXTRAS["all"]
    # The packages of a cloud are large, and nobody needs them all: they are installed by name.
    wanted = {*OPTIONAL, "examples"} - {"gcs", "azure"}
    assert set(re.fullmatch(r"loopkit-torch\[(.*)\]", line)[1].split(",")) == wanted
