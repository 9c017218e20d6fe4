"""Loggers by name, as ``Fit(loggers=…)`` accepts them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from loopkit.errors import OptionError, nearest
from loopkit.loggers.base import Logger
from loopkit.loggers.remote import RemoteLogger

LOGGERS = {
    "jsonl": ("loopkit.loggers.jsonl", "JsonlLogger"),
    "csv": ("loopkit.loggers.csv", "CsvLogger"),
    "tensorboard": ("loopkit.loggers.tensorboard", "TensorBoardLogger"),
    "wandb": ("loopkit.loggers.wandb", "WandbLogger"),
    "mlflow": ("loopkit.loggers.mlflow", "MLflowLogger"),
    "comet": ("loopkit.loggers.comet", "CometLogger"),
    "clearml": ("loopkit.loggers.clearml", "ClearMLLogger"),
    "trackio": ("loopkit.loggers.trackio", "TrackioLogger"),
}
# These need no package that loopkit does not install.
FILES = ("jsonl", "csv", "tensorboard")


def build_loggers(spec: Any) -> list[Logger]:
    """Return the loggers that a user gave. Nothing is opened or written.

    The module of a logger is imported only if its name is given.

    Args:
        spec: a name, a Logger, a sequence of both, or None, False or () for no loggers.

    Raises:
        OptionError, MissingExtraError: as ``check_loggers``.
    """
    return [_named(item) if isinstance(item, str) else item for item in check_loggers(spec)]


def check_loggers(spec: Any) -> list[str | Logger]:
    """Return the loggers that a user gave as a list of names and Loggers. Nothing is opened.

    Raises:
        OptionError: an unknown name, a service given twice, or something that is no Logger.
        MissingExtraError: a service's package is not installed.
    """
    if spec is None or spec is False:
        return []
    items = list(spec) if isinstance(spec, Iterable) and not isinstance(spec, str) else [spec]
    services: set[str] = set()
    for index, item in enumerate(items):
        if isinstance(item, str):
            if item not in LOGGERS:
                known = ", ".join(map(repr, LOGGERS))
                raise OptionError(
                    f"there is no logger {item!r}.{nearest(item, LOGGERS)} "
                    f"Loggers: {known}, or objects"
                )
            if item in items[:index]:
                raise OptionError(
                    f"loggers names {item!r} twice, and both would write the same file"
                )
            if item not in FILES:
                # Made once now, so that a missing package is reported before the run starts.
                _named(item)
                _once(item, services)
        elif not isinstance(item, Logger):
            hint = (
                "give an instance, with ()"
                if isinstance(item, type)
                else "derive it from loopkit's Logger"
            )
            raise OptionError(f"loggers holds {item!r}, which is not a Logger: {hint}")
        elif isinstance(item, RemoteLogger):
            _once(item.name, services)
    return items


def _once(name: str, services: set[str]) -> None:
    if name in services:
        raise OptionError(f"loggers holds two for {name}, and both would write {name}.json")
    services.add(name)


def _named(name: str) -> Logger:
    module, kind = LOGGERS[name]
    logger: Logger = getattr(import_module(module), kind)()
    return logger
