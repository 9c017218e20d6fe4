"""The loggers and the upload that a Trainer's report_to, run_name, project, push_to_hub and hub_*
stand for.
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
    """The source of ``loggers``, the imports it needs, and the services there is no logger for.

    Nothing where ``report_to`` is not given, or "all": the default stands.
    """
    asked = given.get("report_to")
    asked = [asked] if isinstance(asked, str) else list(asked or [])
    if not asked or asked == ["all"]:
        return "", [], []
    lost = [name for name in asked if name not in SERVICES and name != "none"]
    names = ["jsonl", *dict.fromkeys(SERVICES[name] for name in asked if name in SERVICES)]
    sources, imports = [], []
    for name in names:
        arguments = {"project": given.get("project"), "name": given.get("run_name")}
        if name == "trackio":
            arguments |= {
                "space_id": given.get("trackio_space_id"),
                "bucket_id": given.get("trackio_bucket_id"),
            }
        said = ", ".join(f"{key}={value!r}" for key, value in arguments.items() if value)
        if name not in FILES and said:
            module, kind = LOGGERS[name]
            sources.append(f"{kind}({said})")
            imports.append(f"from {module} import {kind}")
        else:
            sources.append(repr(name))
    return f"[{', '.join(sources)}]", imports, lost


def hub_source(given: Mapping[str, Any]) -> str:
    """The source of the PushToHub; the repository is called as the output directory where no name
    is given.
    """
    repo = (
        given.get("hub_model_id")
        or Path(str(given.get("output_dir") or "trainer_output")).absolute().name
    )
    when = str(given.get("hub_strategy") or "every_save").lower().rpartition(".")[2]
    arguments = {"private": given.get("hub_private_repo"), "revision": given.get("hub_revision")}
    said = "".join(f", {name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"PushToHub({repo!r}, {when!r}{said})"
