"""Public names of a package that are imported when they are first asked for."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from loopkit.foreign_values import missing_attribute


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and the ``__dir__`` of a package.

    Args:
        package: its full name.
        homes: the module inside the package that defines each name. A name whose home is "" is a
            module of the package itself.
    """

    def __getattr__(name: str) -> Any:
        if name not in homes:
            raise missing_attribute(package, name)
        if not homes[name]:
            return _imported(f"{package}.{name}")
        value = getattr(_imported(f"{package}.{homes[name]}"), name)
        vars(sys.modules[package])[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return __getattr__, __dir__


def _imported(module: str) -> ModuleType:
    with _no_collection():
        return importlib.import_module(module)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Stop the garbage collector inside the block, if it runs.

    Imports make objects that stay, and no garbage. The collector would look at all of them again
    and again, among them those of torch: that took half of the time of the import.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
