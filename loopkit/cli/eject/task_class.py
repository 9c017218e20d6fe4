"""The class of a task, and its bases, as plain modules of torch."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

from torch import nn

from loopkit.cli.eject.refusals import refuse
from loopkit.cli.eject.source import SourceModule, SourceModules, extent
from loopkit.interop.huggingface import HFTask
from loopkit.task import Task

_STARTS = ("train_step", "train_data", "configure_model", "forward", "weight")
# What a class derived from HFTask may use of it in code that training runs.
KEPT = ("model", "tokenizer", "weight", "train_step", "train_data", "log")
_LOG = '''
    def log(self, name: str, value: Any, reduce: str = "mean") -> None:
        """Drop the value; print or record it here."""
'''


class TaskClasses:
    """The classes between a task and ``loopkit.Task``.

    Args:
        task: the class of the task.
        modules: the modules of the user.
        keeps_optimizers: whether ``optimizers`` makes torch's own optimizer.
        called: further methods that training calls.

    Raises:
        OptionError: a class is not at the top of its file.
    """

    def __init__(
        self,
        task: type[Task],
        modules: SourceModules,
        *,
        keeps_optimizers: bool,
        called: Iterable[str] = (),
    ) -> None:
        self.nodes: dict[str, tuple[SourceModule, ast.ClassDef]] = {}
        for kind in task.__mro__[: task.__mro__.index(Task)]:
            if not issubclass(kind, Task) or kind is HFTask:
                continue  # a base beside Task is carried over as any class
            source = modules.of(kind.__module__)
            node = source.definitions.get(kind.__name__, [None])[-1]
            if not isinstance(node, ast.ClassDef):
                raise refuse(kind.__qualname__, "define the class at the top of its file")
            self.nodes[kind.__name__] = source, node
        self.kept = self._reachable([*_STARTS, *called, *["optimizers"] * keeps_optimizers])

    def _reachable(self, starts: Iterable[str]) -> set[tuple[str, str]]:
        """Return the methods that training may call, by class and name.

        Of a method that several classes define, the first counts, unless ``super()`` calls it.
        """
        parts = {(owner, part) for owner, (_, node) in self.nodes.items() for part in node.body}
        methods = {(owner, part.name): part for owner, part in parts if _is_method(part)}
        names = {name for _, name in methods}
        wanted = {n for n in names if n in starts or hasattr(nn.Module, n) or n.startswith("__")}
        waiting: list[ast.AST] = [part for _, part in parts if not _is_method(part)]
        kept: set[tuple[str, str]] = set()
        inherited: set[str] = set()
        while True:
            wanted |= {name for part in waiting for name in _attributes(part) if name in names}
            inherited |= {name for part in waiting for name in _super_calls(part)}
            found = {key for key in self._first(methods, wanted, inherited) if key not in kept}
            if not found:
                return kept
            kept |= found
            waiting = [methods[key] for key in found]

    def _first(
        self, methods: Mapping[tuple[str, str], ast.AST], wanted: set[str], inherited: set[str]
    ) -> Iterator[tuple[str, str]]:
        for name in wanted:
            owners = [owner for owner in self.nodes if (owner, name) in methods]
            yield from ((owner, name) for owner in owners[: None if name in inherited else 1])

    def text(self, name: str) -> str:
        """Return a class with ``nn.Module`` for ``Task``, without the methods that nothing calls.

        Raises:
            OptionError: the class uses what loopkit adds to a module.
        """
        source, node = self.nodes[name]
        lines = source.text.splitlines()
        first, last = extent(node, lines)
        for part in reversed(node.body):
            if self._goes(name, part):
                start, end = extent(part, lines)
                while start > node.lineno and not lines[start - 1].strip():
                    start -= 1
                del lines[start:end]
                last -= end - start
        only_docstring = all(self._goes(name, part) or _is_docstring(part) for part in node.body)
        body = "\n".join(lines[first:last])
        if only_docstring and not any(map(_is_docstring, node.body)):
            body += "\n    pass"
        body = self._with_base(body, source, node)
        attributes = set(_attributes(ast.parse(body)))
        if "hparams" in attributes:
            raise refuse(f"{name}'s use of hparams", "keep the arguments as attributes of your own")
        if issubclass(_value_of(name, source), HFTask):
            self._check_inherited(source, attributes)
        if "log" in attributes and self._is_lowest(source, node):
            body += f"\n{_LOG.rstrip()}"
        return body

    def _goes(self, owner: str, part: ast.stmt) -> bool:
        return _is_method(part) and (owner, part.name) not in self.kept

    def _is_lowest(self, source: SourceModule, node: ast.ClassDef) -> bool:
        return any(_value(base, source) in (Task, HFTask) for base in node.bases)

    def _check_inherited(self, source: SourceModule, attributes: set[str]) -> None:
        own = {
            part.name for _, node in self.nodes.values() for part in node.body if _is_method(part)
        }
        for name in sorted(attributes - own - {*KEPT}):
            if name in vars(HFTask) and not name.startswith("__"):
                raise refuse(
                    f"HFTask.{name} in {source.file}", f"the script's HFTask has {', '.join(KEPT)}"
                )

    def _with_base(self, body: str, source: SourceModule, node: ast.ClassDef) -> str:
        """Replace the base Task in the class's header."""
        module = "nn.Module" if vars(source.module).get("nn") is nn else "torch.nn.Module"
        for base in node.bases:
            if _value(base, source) is Task:
                old = ast.get_source_segment(source.text, base) or "Task"
                head, colon, rest = body.partition(f"class {node.name}")
                body = head + colon + rest.replace(old, module, 1)
        return body


def _value_of(name: str, source: SourceModule) -> Any:
    return vars(source.module)[name]


def _value(node: ast.expr, source: SourceModule) -> object:
    """Return what a name, or a chain of attributes, is in the module."""
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, source), node.attr, None)
    return vars(source.module).get(node.id) if isinstance(node, ast.Name) else None


def _attributes(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            yield part.attr


def _super_calls(node: ast.AST) -> Iterator[str]:
    """Yield the names of the methods that are called on ``super()``, or on a class by its name."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            owner = part.value
            by_class = isinstance(owner, ast.Name) and owner.id[:1].isupper()
            by_super = isinstance(owner, ast.Call) and ast.unparse(owner.func) == "super"
            if by_class or by_super:
                yield part.attr


def _is_method(part: ast.AST) -> TypeGuard[ast.FunctionDef | ast.AsyncFunctionDef]:
    return isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef))


def _is_docstring(part: ast.stmt) -> bool:
    return isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)
