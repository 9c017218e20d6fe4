"""Loggers by name: what ``Fit(loggers=…)`` accepts."""

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
FILES = ("jsonl", "csv", "tensorboard")  # which need nothing that loopkit does not bring


def build_loggers(spec: Any) -> list[Logger]:
    """The loggers for what a user gave: names, Logger objects, a sequence of both, or None, False
    or () for none.

    Nothing is opened or written. A logger's module is imported only when its name is given.

    Raises:
        OptionError: as ``check_loggers``.
    """
    return [_named(item) if isinstance(item, str) else item for item in check_loggers(spec)]


def check_loggers(spec: Any) -> list[str | Logger]:
    """What a user gave as a list; nothing is opened, and no service's package imported.

    Raises:
        OptionError: an unknown name, a service given twice, or something that is no Logger.
        MissingExtraError: a service's package is not installed.
    """
    if spec is None or spec is False:
        return []
    items = list(spec) if isinstance(spec, Iterable) and not isinstance(spec, str) else [spec]
    services: set[str] = set()
    for place, item in enumerate(items):
        if isinstance(item, str):
            if item not in LOGGERS:
                known = ", ".join(map(repr, LOGGERS))
                raise OptionError(
                    f"there is no logger {item!r}.{nearest(item, LOGGERS)} Loggers: {known}, or "
                    f"objects"
                )
            if item in items[:place]:
                raise OptionError(
                    f"loggers names {item!r} twice, and both would write the same file"
                )
            if item not in FILES:
                _named(item)  # or a missing package would be told only when the run starts
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
        raise OptionError(
            f"loggers holds two for {name}, and both would keep their place in {name}.json"
        )
    services.add(name)


def _named(name: str) -> Logger:
    module, kind = LOGGERS[name]
    logger: Logger = getattr(import_module(module), kind)()
    return logger
