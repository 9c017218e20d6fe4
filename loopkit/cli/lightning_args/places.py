"""Lightning's strategies, plugins and loggers, as loopkit's."""

from __future__ import annotations

from typing import Any

from loopkit.cli.lightning_args.call_arguments import Arguments, WrittenCall
from loopkit.cli.lightning_args.lightning_script import Script
from loopkit.cli.lightning_args.plain_options import in_seconds, set_precision, translated
from loopkit.foreign_names import FOREIGN_NAMES, Reason

_NO_ARGUMENT = "loopkit's counterpart has no such argument"
_DDP = (
    "find_unused_parameters",
    "static_graph",
    "gradient_as_bucket_view",
    "bucket_cap_mb",
    "broadcast_buffers",
)
_ELSEWHERE = {
    "DeepSpeed": "a LightningTask trains by DDP and FSDP: take FSDP(), or write the module as a Task",
    "TensorParallel": "a LightningTask trains by DDP and FSDP: write the module as a Task, and give "
    "strategy=TensorParallel(plan, size=2)",
}
_CLUSTERS = ("SLURMEnvironment", "TorchElasticEnvironment", "LightningEnvironment", "LSFEnvironment",
             "KubeflowEnvironment", "MPIEnvironment", "XLAEnvironment")  # fmt: skip
_PRECISIONS = ("MixedPrecision", "HalfPrecision", "DeepSpeedPrecision", "FSDPPrecision")


def convert_strategy(args: Arguments, found: Script) -> None:
    """Convert ``strategy`` and ``plugins``."""
    given = args["strategy"]
    if isinstance(given, WrittenCall):
        _convert_object(args, given, found)
    elif str(given).startswith("deepspeed") or given == "model_parallel":
        args.note(
            "strategy", _ELSEWHERE["TensorParallel" if given == "model_parallel" else "DeepSpeed"]
        )
    elif any(word in str(given) for word in ("xla", "tpu", "hpu")):
        args.note("strategy", "loopkit trains on CPUs, CUDA GPUs and Apple GPUs only")
    elif given != "auto":
        found.fit["strategy"] = _named(str(given))
    plugins = args["plugins"]
    for each in plugins if isinstance(plugins, list) else [plugins] if plugins else []:
        _convert_plugin(args, each, found)


def _named(given: str) -> str:
    for kind in ("ddp_spawn", "ddp_fork", "ddp_notebook"):  # how processes start is no setting here
        given = given.replace(kind, "ddp")
    return translated("strategy", given)


def _convert_object(args: Arguments, given: WrittenCall, found: Script) -> None:
    own = Arguments(given, found.notes)
    if given.name == "DDPStrategy":
        settings = {name: own[name] for name in _DDP if own.is_set(name)}
        if seconds := _timeout(own):
            settings["timeout"] = seconds
        shown = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        found.fit["strategy"] = f"DDP({shown})" if shown else "'ddp'"
        own.note_rest(_DDP_REASONS, _NO_ARGUMENT)
    elif given.name == "FSDPStrategy":
        found.fit["strategy"] = _fsdp(own, found)
        own.note_rest(_FSDP_REASONS, _NO_ARGUMENT)
    elif given.name == "SingleDeviceStrategy":
        found.fit["strategy"] = "'single'"
        own.note_rest({}, "give Fit(accelerator=)")
    else:
        kind = {"DeepSpeedStrategy": "DeepSpeed", "ModelParallelStrategy": "TensorParallel"}.get(
            given.name
        )
        other = f"{given.shown} is a strategy of your own: derive one from loopkit's"
        args.note("strategy", _ELSEWHERE[kind] if kind else other)


_DDP_REASONS = {
    **{
        name: str(meant)
        for name, meant in FOREIGN_NAMES["DDP"].items()
        if isinstance(meant, Reason)
    },
    "ddp_comm_hook": "here that is DDP(compress=...)",
    "start_method": "loopkit, torchrun or srun starts the processes",
    "accelerator": "give Fit(accelerator=)",
}
_FSDP_REASONS = {
    **{name: f"here that is {meant}" for name, meant in FOREIGN_NAMES["FSDP"].items() if not isinstance(meant, Reason)},
    "state_dict_type": "checkpoints are sharded, and `loopkit ckpt export` makes one file of them",
    "auto_wrap_policy": "here that is FSDP(wrap=[Block]), or FSDP(wrap=<parameters>)",
    "process_group_backend": "CUDA tensors go over NCCL, all others over gloo",
    "device_mesh": "here that is FSDP(replicas=2)",
}  # fmt: skip


def _fsdp(own: Arguments, found: Script) -> str:
    shown, offload = [], own["cpu_offload"]
    if isinstance(offload, WrittenCall):
        offload = offload.named.get("offload_params", next(iter(offload.positional), False))
    if offload is True:
        shown.append("offload=True")
    elif offload:
        own.note("cpu_offload", "give FSDP(offload=True)")
    sharding = str(own["sharding_strategy"])
    if sharding == "SHARD_GRAD_OP":
        shown.append("reshard_after_forward=False")
    elif sharding == "NO_SHARD":
        return "'ddp'"
    elif sharding != "FULL_SHARD":
        own.note("sharding_strategy", f"{sharding}: here that is FSDP(replicas=2)")
    if own.is_set("activation_checkpointing") or own.is_set("activation_checkpointing_policy"):
        own.use("activation_checkpointing", "activation_checkpointing_policy")
        found.fit["activation_checkpointing"] = "'full'"
    if seconds := _timeout(own):
        shown.append(f"timeout={seconds!r}")
    return f"FSDP({', '.join(shown)})"


def _timeout(own: Arguments) -> float | int | None:
    value = own["timeout"]
    seconds = in_seconds(value)
    if value is not None and seconds is None:
        own.note("timeout", "give it in seconds")
    return seconds


def _convert_plugin(args: Arguments, each: Any, found: Script) -> None:
    name = each.name if isinstance(each, WrittenCall) else str(getattr(each, "text", each))
    where = f"plugins: {name}"
    if name == "DoublePrecision":
        found.fit["precision"] = "'fp64'"
    elif isinstance(each, WrittenCall) and name in _PRECISIONS:
        own = Arguments(each, found.notes)
        set_precision(own, found, own["precision"])
        own.note_rest({"device": "give Fit(accelerator=)"}, _NO_ARGUMENT)
    elif name == "TorchSyncBatchNorm":
        found.synchronised = True
    elif name in ("AsyncCheckpointIO", "TorchCheckpointIO"):
        found.checkpoint.setdefault("background", repr(name == "AsyncCheckpointIO"))
    elif name in _CLUSTERS:
        found.notes[where] = "the environment of torchrun and srun is read by itself"
    elif name == "BitsandbytesPrecision":
        found.notes[where] = "quantise the layers in the module's __init__"
    else:
        found.notes[where] = "it works inside Lightning: loopkit has strategies and hooks for that"


# For each logger: loopkit's name, its class, and its arguments by Lightning's.
_LOGGERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "TensorBoardLogger": ("tensorboard", "TensorBoardLogger", {}),
    "CSVLogger": ("csv", "CsvLogger", {}),
    "WandbLogger": ("wandb", "WandbLogger", {"project": "project", "name": "name", "offline": "offline",
                    "entity": "entity", "group": "group", "tags": "tags", "notes": "notes"}),
    "MLFlowLogger": ("mlflow", "MLflowLogger", {"experiment_name": "project", "run_name": "name",
                     "tracking_uri": "tracking_uri"}),
    "CometLogger": ("comet", "CometLogger", {"project": "project", "workspace": "workspace", "name": "name"}),
}  # fmt: skip
_IN_RUN_DIR = "a run keeps its files in Fit(run_dir=...)"
_LOGGER_REASONS = {
    **dict.fromkeys(("save_dir", "name", "version", "sub_dir", "dir"), _IN_RUN_DIR),
    "log_model": "checkpoints stay in the run directory",
    "prefix": "give the values other names in the module",
    "flush_logs_every_n_steps": "rows are written as they come",
    "api_key": "the service reads its own environment variable",
    "id": "a resumed run continues by itself",
}  # fmt: skip


def convert_loggers(args: Arguments, found: Script) -> None:
    """Convert ``logger``: False, True, an object, or a list of them."""
    given = args["logger"]
    if given is False or given == []:
        found.fit["loggers"] = "None"
    if not isinstance(given, (WrittenCall, list)) or not given:
        return
    sources: list[str] = ["'jsonl'"]
    for each in given if isinstance(given, list) else [given]:
        name = each.name if isinstance(each, WrittenCall) else str(getattr(each, "text", each))
        if not isinstance(each, WrittenCall) or name not in _LOGGERS:
            found.notes[f"logger: {name}"] = (
                "derive a logger of your own from loopkit.loggers.base.Logger"
            )
            continue
        ours, kind, names = _LOGGERS[name]
        own = Arguments(each, found.notes)
        shown = ", ".join(
            f"{n}={own[theirs]!r}" for theirs, n in names.items() if own.is_set(theirs)
        )
        own.note_rest(_LOGGER_REASONS, _NO_ARGUMENT)
        sources.append(f"{kind}({shown})" if shown else repr(ours))
        if shown:
            found.imports.add(f"from loopkit.loggers.{ours} import {kind}")
    found.fit["loggers"] = f"[{', '.join(sources)}]"


def known_places() -> set[str]:
    """Return the names of Lightning's strategies, plugins and loggers that have an answer of their own."""
    return {
        "DDPStrategy", "FSDPStrategy", "SingleDeviceStrategy", "DeepSpeedStrategy", "ModelParallelStrategy",
        "DoublePrecision", "TorchSyncBatchNorm", "AsyncCheckpointIO", "TorchCheckpointIO", "BitsandbytesPrecision",
        *_PRECISIONS, *_LOGGERS,
    }  # fmt: skip
