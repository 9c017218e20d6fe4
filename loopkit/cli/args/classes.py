"""The classes that options such as ``--hooks`` take, by name or by path."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from loopkit.cli.args.tokens import Text
from loopkit.cli.args.yaml_io import load
from loopkit.errors import nearest
from loopkit.events import Hook, Subscription
from loopkit.fit.setup import LOOPS
from loopkit.foreign_values import OBJECTS, answer
from loopkit.loggers.base import Logger
from loopkit.strategies.base import Strategy
from loopkit.strategies.tensor_parallel import TensorParallel

BASES: dict[str, type] = {"hooks": Hook, "loggers": Logger, "strategy": Strategy, **LOOPS}
PACKAGES = {Hook: "loopkit.hooks", Logger: "loopkit.loggers", Strategy: "loopkit.strategies"}
# Classes that are accepted though they are not derived from the base.
ALSO: dict[type, tuple[type, ...]] = {Strategy: (TensorParallel,)}
_PATH = re.compile(r"[^\W\d]\w*([.:][^\W\d]\w*)*")


@dataclass(frozen=True)
class ClassCall:
    """A class with arguments, as it was typed or read: nothing is looked up yet.

    Attributes:
        name: the class's name, or its path ``package.module.Class``.
        positional: arguments without a name, in order.
        named: arguments by name.
    """

    name: str
    positional: tuple[Any, ...]
    named: Mapping[str, Any]


def read_call(value: Any) -> ClassCall | None:
    """Read ``Name``, ``Name(argument=1)`` or YAML with class_path and init_args.

    Returns:
        None if the value is none of these.
    """
    if isinstance(value, ClassCall):
        return value
    fields = load(value)
    if isinstance(fields, Mapping):
        if "class_path" not in fields or not fields.keys() <= {"class_path", "init_args"}:
            return None
        return ClassCall(str(fields["class_path"]), (), dict(fields.get("init_args") or {}))
    if not isinstance(value, str):
        return None
    if _PATH.fullmatch(value):
        return None if value in ("true", "false", "null") else ClassCall(value, (), {})
    with suppress(SyntaxError, ValueError):
        found = _read_node(ast.parse(value, mode="eval").body, value)
        return found if isinstance(found, ClassCall) else None
    return None


def _read_node(node: ast.expr, text: str) -> Any:
    """Return the value of a literal, a ClassCall for a call, and the text of anything else."""
    if isinstance(node, ast.Call) and not any(each.arg is None for each in node.keywords):
        return ClassCall(
            ast.unparse(node.func),
            tuple(_read_node(each, text) for each in node.args),
            {str(each.arg): _read_node(each.value, text) for each in node.keywords},
        )
    with suppress(ValueError):
        return ast.literal_eval(node)
    return Text(ast.get_source_segment(text, node))


def find_class(base: type, name: str) -> Any:
    """Find what ``name`` means where an object of class ``base`` is asked for.

    Args:
        name: the name of a loaded class derived from ``base``, or the path of any object.

    Returns:
        The class; or whatever else the path leads to.

    Raises:
        LookupError: with the reason, as a sentence.
    """
    if "." in name or ":" in name:
        return _import_path(name.replace(":", "."))
    known = derived_classes(base) if base is not object else []
    found = {path_of(cls): cls for cls in known if cls.__name__ == name}
    if len(found) > 1:
        raise LookupError(f"several classes are called {name}: give one of {', '.join(found)}")
    if found:
        return found.popitem()[1]
    foreign = answer(OBJECTS, name)
    hint = f"{foreign}." if foreign else f".{nearest(name, [cls.__name__ for cls in known])}"
    raise LookupError(
        f"there is no class {name!r}{hint} Give package.module.Class, or the short name of one"
    )


def _import_path(path: str) -> Any:
    """Import the longest part of the path that is a module; follow the rest as attributes."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise LookupError(f"{path} cannot be imported: {error}") from error
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                hint = nearest(part, dir(found))
                raise LookupError(
                    f"{path}: {type(found).__name__} {name!r} has no attribute {part!r}.{hint}"
                )
            found, name = getattr(found, part), f"{name}.{part}"
        return found
    raise LookupError(f"{path} cannot be imported: there is no module {parts[0]!r}")


def derived_classes(base: type) -> list[type]:
    """Return ``base`` and all loaded classes derived from it; loopkit's own are loaded first."""
    if base in PACKAGES:
        package = importlib.import_module(PACKAGES[base])
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            with suppress(ImportError):  # it needs an extra that is not installed
                importlib.import_module(module.name)
    found: list[type] = []
    rest = [base, *ALSO.get(base, ())]
    while rest:
        found.append(rest.pop(0))
        below: list[type] = type.__subclasses__(found[-1])
        rest += [cls for cls in below if cls not in found and cls not in rest]
    return found


def choices(option: str) -> list[type]:
    """Return the classes that ``option`` takes, without the base class."""
    return [cls for cls in derived_classes(BASES[option])[1:] if cls is not Subscription]


def path_of(obj: Any) -> str:
    """Return the path of a class or function, as a config has it under ``class_path``."""
    return f"{obj.__module__}.{obj.__qualname__}"


def summary(cls: type) -> str:
    """Return the first paragraph of a class's own docstring, on one line."""
    paragraph = (inspect.getdoc(cls) or "").partition("\n\n")[0] if cls.__doc__ else ""
    return " ".join(paragraph.replace("``", "").split())
