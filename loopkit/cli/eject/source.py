"""The code of the user's task: what of its files the script needs, found by name."""

from __future__ import annotations

import ast
import builtins
import inspect
import symtable
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from loopkit.cli.eject.refusals import refuse


@dataclass(frozen=True, order=True)
class Import:
    """One imported name: ``import module as name``, or ``from module import attribute as name``."""

    module: str
    attribute: str | None
    name: str


@dataclass
class SourceModule:
    """A module of the user, as text.

    Attributes:
        module: the loaded module.
        text: its source.
        carried: the statements that the script takes over: their text by the number of their line.
    """

    module: ModuleType
    text: str
    carried: dict[int, str] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """The name of the file, for messages."""
        return Path(str(self.module.__file__)).name

    @classmethod
    def read(cls, module: ModuleType) -> SourceModule:
        """Read the source of a loaded module.

        Raises:
            OptionError: the module has no file of Python source.
        """
        try:
            return cls(module, inspect.getsource(module))
        except (OSError, TypeError) as error:
            raise refuse(module.__name__, f"its source cannot be read ({error})") from error

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        """The top-level statements that define each name."""
        found: dict[str, list[ast.stmt]] = {}
        for statement in self.tree.body:
            if not isinstance(statement, (ast.Import, ast.ImportFrom)):
                for name in set(_bound_names(statement)):
                    found.setdefault(name, []).append(statement)
        return found

    @cached_property
    def effects(self) -> list[ast.stmt]:
        """The top-level statements that define nothing and are no docstring, such as calls."""
        return [
            statement
            for statement in self.tree.body
            if isinstance(statement, (ast.Expr, ast.Assign, ast.AugAssign, ast.Delete))
            and not isinstance(getattr(statement, "value", None), ast.Constant)
            and not any(_bound_names(statement))
        ]

    @cached_property
    def imports(self) -> dict[str, Import]:
        """The names that top-level imports bind, those under ``if TYPE_CHECKING`` included."""
        found: dict[str, Import] = {}
        for node in self.tree.body:
            plain = isinstance(node, (ast.Import, ast.ImportFrom))
            inner = [node] if plain else node.body if isinstance(node, ast.If) else []
            for statement in inner:
                found |= {each.name: each for each in _imports(statement, self.module)}
        return found

    def segment(self, statement: ast.stmt) -> str:
        """Return the text of a statement, with its decorators and the comments directly above."""
        lines = self.text.splitlines()
        first, last = extent(statement, lines)
        return "\n".join(lines[first:last])


class SourceModules:
    """The modules of the user, each read once."""

    def __init__(self) -> None:
        self.read: dict[str, SourceModule] = {}

    def of(self, name: str) -> SourceModule:
        """Return the loaded module of that name.

        Raises:
            OptionError: it has no file of Python source.
        """
        if name not in self.read:
            self.read[name] = SourceModule.read(sys.modules[name])
        return self.read[name]


def extent(statement: ast.stmt, lines: list[str]) -> tuple[int, int]:
    """Return the lines of a statement as a slice, with decorators and the comments directly above."""
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(each.lineno for each in decorators)]) - 1
    indent = " " * statement.col_offset
    while first and lines[first - 1].startswith(f"{indent}#"):
        first -= 1
    return first, statement.end_lineno or statement.lineno


def free_names(text: str) -> set[str]:
    """Return the names that Python source takes from outside of itself; annotations count."""
    table = symtable.symtable(text, "<carried>", "exec")
    own = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned()}
    own |= {child.get_name() for child in table.get_children()}
    used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_referenced()}
    used |= set(_inner_globals(table))
    for node in ast.walk(ast.parse(text)):
        for name in ("annotation", "returns"):
            annotation = getattr(node, name, None)
            if isinstance(annotation, ast.AST):
                used |= {part.id for part in ast.walk(annotation) if isinstance(part, ast.Name)}
    return used - own - set(dir(builtins))


def _inner_globals(table: symtable.SymbolTable) -> Iterator[str]:
    for child in table.get_children():
        for symbol in child.get_symbols():
            if symbol.is_global() and symbol.is_referenced():
                yield symbol.get_name()
        yield from _inner_globals(child)


def uses_loopkit(module: ModuleType) -> bool:
    """Return whether a module is loopkit's, or imports from it, directly or through its own files."""
    return _uses_loopkit(module.__name__, set())


def _uses_loopkit(name: str, seen: set[str]) -> bool:
    if name.split(".")[0] == "loopkit":
        return True
    module = sys.modules.get(name)
    file = getattr(module, "__file__", None)
    if name in seen or not file or not file.endswith(".py") or _is_installed(Path(file)):
        return False
    seen.add(name)
    assert module is not None
    imported = SourceModule.read(module).imports.values()
    return any(_uses_loopkit(each.module, seen) for each in imported)


def _is_installed(file: Path) -> bool:
    parts = file.parts
    return "site-packages" in parts or file.is_relative_to(Path(ast.__file__).parent)


def is_users(module: ModuleType) -> bool:
    """Return whether a module is a file of the user, and not of an installed package."""
    file = getattr(module, "__file__", None)
    return bool(file) and not _is_installed(Path(str(file)))


def _bound_names(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
        return
    targets: list[Any] = getattr(statement, "targets", [getattr(statement, "target", None)])
    for target in filter(None, targets):
        yield from (node.id for node in ast.walk(target) if _stores(node))
    for part in ("body", "orelse", "finalbody", "handlers"):
        for inner in getattr(statement, part, []):
            if isinstance(inner, (ast.Import, ast.ImportFrom)):
                yield from (alias.asname or alias.name.split(".")[0] for alias in inner.names)
            elif isinstance(inner, ast.ExceptHandler):
                for each in inner.body:
                    yield from _bound_names(each)
            else:
                yield from _bound_names(inner)


def _stores(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


def _imports(statement: ast.stmt, module: ModuleType) -> Iterator[Import]:
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            bound = alias.asname or alias.name.split(".")[0]
            yield Import(alias.name, None, bound)
    elif isinstance(statement, ast.ImportFrom):
        source = statement.module or ""
        if statement.level:
            package = module.__package__ or ""
            source = resolve_name("." * statement.level + source, package)
        for alias in statement.names:
            yield Import(source, alias.name, alias.asname or alias.name)
