"""The loggers and the upload that a Trainer's arguments ask for, as Python source.

The arguments are report_to, run_name, project, trackio_*, push_to_hub and hub_*.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopkit.loggers.registry import FILES, LOGGERS

SERVICES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "azure_ml": "mlflow",
    "comet_ml": "comet",
    "clearml": "clearml",
    "trackio": "trackio",
}


def logger_sources(given: Mapping[str, Any]) -> tuple[str, list[str], list[str]]:
    """Return the source of ``loggers``, the imports it needs, and the services without a logger.

    All are empty if ``report_to`` is not given, or is "all": then the default of Fit is right.
    """
    services = given.get("report_to")
    services = [services] if isinstance(services, str) else list(services or [])
    if not services or services == ["all"]:
        return "", [], []
    missing = [name for name in services if name not in SERVICES and name != "none"]
    names = dict.fromkeys(SERVICES[name] for name in services if name in SERVICES)
    sources, imports = [], []
    for name in ("jsonl", *names):
        arguments = {"project": given.get("project"), "name": given.get("run_name")}
        if name == "trackio":
            arguments["space_id"] = given.get("trackio_space_id")
            arguments["bucket_id"] = given.get("trackio_bucket_id")
        shown = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if value)
        if name in FILES or not shown:
            sources.append(repr(name))
            continue
        module, kind = LOGGERS[name]
        sources.append(f"{kind}({shown})")
        imports.append(f"from {module} import {kind}")
    return f"[{', '.join(sources)}]", imports, missing


def hub_source(given: Mapping[str, Any]) -> str:
    """Return the source of the PushToHub hook.

    Without ``hub_model_id`` the repository has the name of the output directory.
    """
    directory = Path(str(given.get("output_dir") or "trainer_output")).absolute().name
    repo = given.get("hub_model_id") or directory
    when = str(given.get("hub_strategy") or "every_save").lower().rpartition(".")[2]
    arguments = {"private": given.get("hub_private_repo"), "revision": given.get("hub_revision")}
    shown = "".join(f", {name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"PushToHub({repo!r}, {when!r}{shown})"
