"""DeepSpeed's configuration: the user's, with what Fit says filled in, and nothing that contradicts
it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopkit.errors import OptionError
from loopkit.strategies.base import ComputeSettings

STAGES = (1, 2, 3)

# What Fit, the Task or the launcher decides; two who decide would be one too many.
_ELSEWHERE = {
    "optimizer": "Task.optimizers() gives the optimizer, which may be one of DeepSpeed's own classes",
    "scheduler": "Task.optimizers() gives the schedule, as schedule= of an optimizer",
    "amp": "Fit(precision=) gives the precision",
    "torch_autocast": "Fit(precision='bf16') runs the forward pass under autocast",
    "elasticity": "it changes the batch size, and so the run: start as many ranks as you want, and resume='auto'",
    "hybrid_engine": "it replaces the task's modules",
    "checkpoint": "Fit(checkpoint=) saves, in a format that every strategy reads",
}
_PRECISIONS = {"bf16-true": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class ZeroSettings:
    """What is asked of DeepSpeed by name rather than in its configuration; None leaves it to the
    configuration.
    """

    stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False


def check_numerics(numerics: ComputeSettings, stage: int) -> None:
    """Refuse what DeepSpeed has not.

    Raises:
        OptionError: with the reason, and what to do.
    """
    precision = numerics.precision.name
    if precision in ("fp64", "fp16-true"):
        raise OptionError(
            f"precision={precision!r}: DeepSpeed's optimizers keep single precision. Take 'fp32', "
            "'bf16', 'bf16-true' or 'fp16', or strategy='ddp'"
        )
    if numerics.clip_value is not None:
        raise OptionError(
            f"clip_value={numerics.clip_value!r}: DeepSpeed clips by the norm of all gradients "
            f"alone. "
            "Take clip_norm=, or strategy='ddp' or 'fsdp'"
        )
    if stage == 3 and numerics.compile is not None:
        raise OptionError(
            "compile: under stage 3 parameters come and go within the forward pass, by hooks that "
            "torch.compile cannot trace. Take stage=2, or strategy='fsdp'"
        )


def read_config(given: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """The configuration as a dict of its own; a path is that of a JSON file.

    Raises:
        OptionError: the file cannot be read, or holds no JSON object.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return copy.deepcopy(dict(given))
    if not isinstance(given, (str, Path)):
        raise OptionError(f"DeepSpeed(config={given!r}): give a dict, or the path of a JSON file")
    try:
        found = json.loads(Path(given).read_text())
    except (OSError, ValueError) as error:
        raise OptionError(f"DeepSpeed(config={str(given)!r}) cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise OptionError(
            f"DeepSpeed(config={str(given)!r}): the file holds a {type(found).__name__}, no JSON "
            f"object"
        )
    return found


def choose_stage(config: Mapping[str, Any], settings: ZeroSettings) -> int:
    """The stage that the argument or the configuration names; 2 where neither does.

    Raises:
        OptionError: there is no such stage here, or the two differ.
    """
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise OptionError(
            f"DeepSpeed(config=...): zero_optimization is {zero!r}: give an object with 'stage'"
        )
    named = zero.get("stage", "auto")
    if settings.stage is not None and named not in ("auto", settings.stage):
        raise OptionError(
            f"DeepSpeed(stage={settings.stage!r}) and zero_optimization.stage={named!r} in its "
            f"config "
            "differ: leave one of them out"
        )
    stage = settings.stage if settings.stage is not None else 2 if named == "auto" else named
    if stage == 0 and type(stage) is int:
        raise OptionError(
            "DeepSpeed(stage=0) shards nothing, which is strategy='ddp'; and in bf16, DeepSpeed "
            "0.19 "
            "takes a step of the optimizer before the first one. Give stage 1, 2 or 3"
        )
    if type(stage) is not int or stage not in STAGES:
        raise OptionError(
            f"DeepSpeed(stage={stage!r}): give 1 (shards optimizer state), 2 (gradients too) or 3 "
            "(parameters too)"
        )
    if settings.offload_parameters and stage != 3:
        raise OptionError(
            f"DeepSpeed(stage={stage}, offload_parameters=True): parameters are sharded, and can "
            f"be "
            "kept in the CPU's memory, under stage 3 alone"
        )
    return stage


def resolve(
    config: Mapping[str, Any],
    settings: ZeroSettings,
    numerics: ComputeSettings,
    world_size: int,
    *,
    pin: bool,
) -> dict[str, Any]:
    """The whole configuration for ``deepspeed.initialize``.

    "auto" takes Fit's value where Fit has one, and DeepSpeed's default elsewhere.

    Args:
        pin: whether memory on the CPU is pinned for copies to a GPU.

    Raises:
        OptionError: a section that Fit or the Task decides, or a value that contradicts Fit's.
    """
    for section, why in _ELSEWHERE.items():
        if section in config:
            raise OptionError(
                f"DeepSpeed(config=...) has a section {section!r}: leave it out, {why}"
            )
    whole = _without_auto(copy.deepcopy(dict(config)))
    whole.update(_batches(whole, numerics, world_size))
    clip = numerics.clip_norm or 0.0
    _agree(whole, "gradient_clipping", clip, f"Fit(clip_norm={numerics.clip_norm!r})")
    whole["gradient_clipping"] = clip  # left out, DeepSpeed would clip to a norm of 1
    _set_precision(whole, numerics)
    zero = whole.setdefault("zero_optimization", {})
    zero["stage"] = choose_stage(config, settings)
    if settings.offload_optimizer:
        zero.setdefault("offload_optimizer", {"device": "cpu", "pin_memory": pin})
    if settings.offload_parameters:
        zero.setdefault("offload_param", {"device": "cpu", "pin_memory": pin})
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise OptionError(
                f"DeepSpeed(config=...): {part}.device='nvme' swaps state to files that a "
                f"checkpoint "
                "cannot reach: give 'cpu'"
            )
    if zero.get("zenflow") is not None:
        raise OptionError(
            "DeepSpeed(config=...): zenflow updates parameters out of step, so no step could be "
            "resumed: "
            "leave it out"
        )
    grad_accum = (whole.get("data_types") or {}).get("grad_accum_dtype")
    if (
        zero["stage"] == 1
        and numerics.precision.name == "bf16-true"
        and grad_accum in ("fp32", "float32")
    ):
        raise OptionError(
            "DeepSpeed(stage=1) with data_types.grad_accum_dtype='fp32' under "
            "precision='bf16-true' is another engine (BF16_Optimizer), which begins with a step of "
            "its "
            "own: give stage=2"
        )
    whole["zero_allow_untested_optimizer"] = True
    whole["zero_force_ds_cpu_optimizer"] = False  # the optimizer is the task's
    whole.setdefault("steps_per_print", 10**9)
    return whole


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item != "auto"
    }


def _agree(config: Mapping[str, Any], key: str, ours: Any, who: str) -> None:
    if key in config and config[key] != ours:
        raise OptionError(
            f"DeepSpeed(config=...) has {key}={config[key]!r}, and {who} makes that {ours!r}: make "
            f"them "
            "the same, or write 'auto'"
        )


def _batches(
    config: Mapping[str, Any], numerics: ComputeSettings, world_size: int
) -> dict[str, int]:
    """The sizes that DeepSpeed wants told, of which one follows from the others."""
    size, accumulate = numerics.batch_size, numerics.accumulate
    who = f"Fit(batch_size={size}, accumulate={accumulate}) on {world_size} rank(s)"
    if numerics.global_batch_size is not None:
        accumulate = max(1, numerics.global_batch_size // (size * world_size))
        who = f"Fit(batch_size={size}, global_batch_size={numerics.global_batch_size}) on {world_size} rank(s)"
    sizes = {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": size * accumulate * world_size,
    }
    for key, ours in sizes.items():
        _agree(config, key, ours, who)
    return sizes


def _set_precision(config: dict[str, Any], numerics: ComputeSettings) -> None:
    wanted = _PRECISIONS.get(numerics.precision.name)
    for section in ("bf16", "fp16"):
        part = config.setdefault(section, {})
        if part.get("enabled") not in (None, section == wanted):
            name = next(ours for ours, theirs in _PRECISIONS.items() if theirs == section)
            raise OptionError(
                f"DeepSpeed(config=...) has {section}.enabled={part['enabled']!r}, and "
                f"Fit(precision={numerics.precision.name!r}); {section}.enabled is "
                f"precision={name!r} "
                "here: make them the same, or write 'auto'"
            )
        part["enabled"] = section == wanted
    if wanted == "bf16":
        if config["bf16"].get("check_grad_overflow") is False:
            raise OptionError(
                "DeepSpeed(config=...) has bf16.check_grad_overflow=False, which lets a gradient "
                "that is "
                "not finite reach the parameters: leave it out"
            )
        config["bf16"]["check_grad_overflow"] = True
