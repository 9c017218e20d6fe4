"""The loggers and the upload that a Trainer's arguments ask for, as Python source.

The arguments are report_to, logging_dir, run_name, project, trackio_*, push_to_hub and hub_*.
"""

from __future__ import annotations

from pathlib import Path

from loopkit.cli.trainer_arguments import TrainerArguments
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


def logger_sources(args: TrainerArguments, notes: dict[str, str]) -> tuple[str, list[str]]:
    """Return the source of ``loggers`` and the imports it needs.

    Both are empty if the default of Fit is right.
    """
    services = args["report_to"]
    services = [services] if isinstance(services, str) else services
    folder = str(args.peek("logging_dir") or "")
    # A dump of version 4 has the path that the Trainer makes up.
    folder = "" if "/runs/" in f"/{folder}" else folder
    args.use("logging_dir")
    if services is None or services == ["all"]:
        if not folder:
            return "", []
        services = ["tensorboard"]
    missing = [name for name in services if name not in SERVICES and name != "none"]
    if missing:
        names = ", ".join(missing)
        notes["report_to"] = f"there is no logger for {names}: derive one from Logger"
    wanted = dict.fromkeys(SERVICES[name] for name in services if name in SERVICES)
    sources, imports = [], []
    for name in ("jsonl", *wanted):
        shown = _arguments(name, args, folder)
        if not shown:
            sources.append(repr(name))
            continue
        module, kind = LOGGERS[name]
        sources.append(f"{kind}({shown})")
        imports.append(f"from {module} import {kind}")
    if folder and "tensorboard" not in wanted:
        notes["logging_dir"] = "TensorBoardLogger(dir) takes it, and report_to names no tensorboard"
    return f"[{', '.join(sources)}]", imports


def _arguments(name: str, args: TrainerArguments, folder: str) -> str:
    """Return the source of a logger's arguments."""
    if name in FILES:
        return f"dir={folder!r}" if name == "tensorboard" and folder else ""
    wanted = {"project": "project", "name": "run_name"}
    if name == "trackio":
        wanted |= {"space_id": "trackio_space_id", "bucket_id": "trackio_bucket_id"}
    return ", ".join(
        f"{ours}={args[theirs]!r}" for ours, theirs in wanted.items() if args.is_set(theirs)
    )


def hub_source(args: TrainerArguments) -> str:
    """Return the source of the PushToHub hook.

    Without ``hub_model_id`` the repository has the name of the output directory.
    """
    directory = Path(str(args["output_dir"])).absolute().name
    repo = args["hub_model_id"] or directory
    when = str(args["hub_strategy"]).lower().rpartition(".")[2]
    if args["hub_always_push"] and when in ("every_save", "checkpoint"):
        when = "all_checkpoints"
    arguments = {"private": args["hub_private_repo"], "revision": args["hub_revision"]}
    shown = "".join(f", {name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"PushToHub({repo!r}, {when!r}{shown})"
