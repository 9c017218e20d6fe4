"""Limits of the source: sizes, layers, names. A limit is raised only with a decision record."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "loopkit"
FILES = sorted(PACKAGE.rglob("*.py"))

# Statements, not lines: the formatter owns the layout. Each name of a parallel assignment counts.
MOST_FILE_STATEMENTS = 200
MOST_FUNCTION_STATEMENTS = 50
MOST_PUBLIC_METHODS = 15
RAISED = {"Task": 17}  # docs/decisions/task-methods.md
MOST_BASES_INSIDE = 2

# The layers, from the lowest up. A room may import from its own layer and from lower ones.
# docs/architecture.md shows them: run python -m tests.docs.architecture_picture after a change.
LAYERS = (
    {
        "errors",
        "hparams",
        "module_state",
        "task_changes",
        "checks",
        "cpu_memory",
        "monitor",
        "durations",
        "rng",
        "foreign_names",
        "foreign_values",
        "keywords",
        "lazy",
        "nested",
        "devices",
        "dtypes",
        "files",
        "preserve",
        "sharded",
        "timings",
        "version",
    },
    {"events", "distributed"},
    {"checkpoint", "data", "loggers", "metrics.accumulator"},
    {"run_file"},
    {"storage"},
    {"task"},
    {"optim", "metrics"},
    {"strategies", "interop"},
    {"options", "triggers"},
    {"run"},
    {
        "hooks",
        "console",
        "loops",
        "interop.lightning",
        "fit.length",
        "fit.agreement",
        "fit.state",
        "fit.checkpointer",
        "fit.signals",
        "fit.job_clock",
        "fit.task_checks",
        "fit.strategy_setup",
        "fit.remote_run",
    },
    {
        "fit.setup",
        "fit.lifecycle",
        "fit.origin",
        "fit.run_dir",
        "fit.run_keeper",
        "result",
        "fit.notebook",
        "fit.prepared",
    },
    {"fit"},
    {"testing", "plan"},
    {"cli", "__main__", "__init__"},
)
FORBIDDEN = ("mixin", "manager", "connector", "handler", "util", "helper", "misc", "common")
OPTIONAL = {
    "rich", "yaml", "tensorboardX", "matplotlib", "torchmetrics", "IPython", "sklearn", "deepspeed", "cloudpickle",
    "transformers", "peft", "mlflow", "huggingface_hub", "filelock", "nltk",
    "optuna", "fsspec", "ray",
}  # fmt: skip


@cache
def parsed(path: Path) -> ast.Module:
    """Return the source of a file, parsed where a test asks for it: not in every worker."""
    return ast.parse(path.read_text())


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


# A test for each room: one for each file would take longer than its work.
ROOMS = sorted({room(path) for path in FILES})


def files_of(where: str) -> list[Path]:
    return [path for path in FILES if room(path) == where]


def layer_of(module: str) -> int:
    """Return the layer of a dotted name below loopkit. The most exact entry decides."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        for number, layer in enumerate(LAYERS):
            if ".".join(parts[:length]) in layer:
                return number
    raise AssertionError(f"loopkit.{module} has no layer: give it one in LAYERS")


def imports(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yield the names that are imported at run time, without those under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if node.module == "loopkit" or is_module(whole) else node.module), node
        else:
            yield from imports(node)


def is_module(name: str) -> bool:
    """Return whether a dotted name is a module of loopkit."""
    path = ROOT.joinpath(*name.split("."))
    return name.startswith("loopkit.") and (path.with_suffix(".py").exists() or path.is_dir())


def statements(tree: ast.AST) -> int:
    """Return how many statements a tree holds, without docstrings."""
    count = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or _is_docstring(node):
            continue
        count += 1
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            names, value = len(node.targets[0].elts), node.value
            count += names - 1 if isinstance(value, ast.Tuple) and len(value.elts) == names else 0
    return count


def _is_docstring(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


@pytest.mark.parametrize("where", ROOMS)
def test_sizes_and_names(where):
    for path in files_of(where):
        tree = parsed(path)
        assert statements(tree) <= MOST_FILE_STATEMENTS, f"{path}: {statements(tree)} statements"
        assert not any(
            word in part.lower() for part in path.relative_to(PACKAGE).parts for word in FORBIDDEN
        ), path
        assert ast.get_docstring(tree), f"{path}: no module docstring"
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = statements(node) - 1
                assert length <= MOST_FUNCTION_STATEMENTS, f"{path}: {node.name}: {length}"
            if isinstance(node, ast.ClassDef):
                assert not any(word in node.name.lower() for word in FORBIDDEN), node.name
                assert not any(keyword.arg == "metaclass" for keyword in node.keywords), node.name
                public = [
                    n.name
                    for n in node.body
                    if isinstance(n, ast.FunctionDef) and not n.name.startswith(("_", "on_"))
                ]
                assert len(public) <= RAISED.get(node.name, MOST_PUBLIC_METHODS), (
                    f"{node.name} has {len(public)} public methods"
                )


@pytest.mark.parametrize("where", ROOMS)
def test_imports_point_down(where):
    for path in files_of(where):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        here = layer_of(module.removesuffix(".__init__") or "__init__")
        for name, _ in imports(parsed(path)):
            if name.startswith("loopkit."):
                layer = layer_of(name.removeprefix("loopkit."))
                assert layer <= here, f"{module} imports {name}"


# The command line starts without torch.
@pytest.mark.parametrize("where", [where for where in ROOMS if where != "cli"])
def test_function_level_imports_are_for_optional_packages_alone(where):
    for path in files_of(where):
        if path.name in ("__init__.py", "__main__.py"):
            continue  # the package starts without torch too
        for function in ast.walk(parsed(path)):
            if isinstance(function, (ast.FunctionDef, ast.Lambda)):
                for name, _ in imports(function):
                    lazy = name.split(".")[0] in {*OPTIONAL, "torch"} or name.startswith(
                        ("loopkit.console.", "loopkit.loggers.")
                    )
                    assert lazy, f"{path}: {name} is imported inside a function"


def test_inheritance_is_shallow():
    bases = {
        node.name: [ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases]
        for tree in map(parsed, FILES)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }

    def depth(name: str) -> int:
        return 1 + max(
            (depth(base) for base in bases[name] if base in bases and base != name), default=-1
        )

    errors = {
        node.name
        for node in ast.walk(parsed(PACKAGE / "errors.py"))
        if isinstance(node, ast.ClassDef)
    }
    deep = {
        name: depth(name)
        for name in bases
        if name not in errors and depth(name) > MOST_BASES_INSIDE
    }
    assert not deep


def test_no_global_statement_and_no_unpickling():
    for path in FILES:
        tree = parsed(path)
        for node in ast.walk(tree):
            assert not isinstance(node, ast.Global), f"{path.name} changes a module's variable"
            # `loopkit ckpt import` runs this file as a process of its own.
            if isinstance(node, ast.Call) and path.name != "torch_file.py":
                called = ast.unparse(node.func)
                assert called not in (
                    "torch.load",
                    "torch.save",
                    "pickle.load",
                    "pickle.loads",
                    "eval",
                    "exec",
                ), path.name


def test_only_the_store_touches_files_of_checkpoints():
    for path in (PACKAGE / "checkpoint").glob("*.py"):
        if path.name in ("store.py", "streams.py"):
            continue
        calls = {
            ast.unparse(node.func) for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)
        }
        assert not calls & {
            "open",
            "os.open",
            "os.rename",
            "os.replace",
            "shutil.rmtree",
            "os.fsync",
            "os.mkdir",
        }, path.name


def test_importing_loopkit_brings_in_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, loopkit; loopkit.Fit, loopkit.Task, loopkit.optim.AdamW, "
        "loopkit.interop.HFTask;"
        "print([m for m in ('torchmetrics', 'tensorboardX', 'rich', 'yaml', 'docstring_parser', "
        "'matplotlib', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
