"""The classes that options such as ``--hooks`` take, by short name or by path."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from contextlib import suppress

from loopkit.cli.args.signature import arguments_of
from loopkit.errors import MissingExtraError, OptionError, nearest
from loopkit.events import Hook, Subscription
from loopkit.fit.setup import LOOPS
from loopkit.loggers.base import Logger
from loopkit.strategies.base import Strategy

KINDS: dict[str, type] = {"hooks": Hook, "loggers": Logger, "strategy": Strategy, **LOOPS}
ROOMS = ("hooks", "loggers", "strategies")


def classes_for(option: str) -> list[type]:
    """What ``option`` takes: its base class, the package's own classes, and those of whatever is
    imported.
    """
    for room in ROOMS:
        package = importlib.import_module(f"loopkit.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            with suppress(ImportError, MissingExtraError):  # what is not installed cannot be meant
                importlib.import_module(f"loopkit.{room}.{module.name}")
    return _derived(KINDS[option])


def class_help(option: str, name: str | None) -> str:
    """The classes that ``option`` takes; or, with the short name or path of one, its arguments.

    Raises:
        OptionError: the option takes no classes, or there is none of that name.
    """
    if option not in KINDS:
        raise OptionError(f"--{option}.help: only {', '.join(KINDS)} take classes")
    found = {each.__name__: each for each in classes_for(option)[1:] if each is not Subscription}
    if name is None:
        lines = [f"  {path(each)}: {_about(each)}" for each in found.values()]
        return "\n".join([f"classes for --{option}, of the package and of the target:", *lines])
    cls = found.get(name.rpartition(".")[2])
    if cls is None or name not in (cls.__name__, path(cls)):
        raise OptionError(
            f"--{option}.help: there is no class {name!r}.{nearest(name, found)} "
            f"There are {', '.join(found) or 'none'}"
        )
    lines = [f"{path(cls)}: {_about(cls)}"]
    for one in arguments_of(cls).values():
        default = (
            ", required" if one.required else f", default {one.default!r}" if one.plain else ""
        )
        lines.append(
            f"  --{option}.{one.name}  {one.about}{' ' if one.about else ''}[{one.label}{default}]"
        )
    return "\n".join(lines)


def path(cls: type) -> str:
    """What a config gives as ``class_path``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _about(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0] if cls.__doc__ else ""


def _derived(kind: type) -> list[type]:
    below: list[type] = kind.__subclasses__()
    return [kind, *(deeper for each in below for deeper in _derived(each))]
