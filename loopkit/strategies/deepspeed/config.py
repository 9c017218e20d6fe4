"""DeepSpeed's configuration: the user's, completed by Fit's options, without contradictions."""

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

# Sections that would repeat a decision of Fit, the Task or the launcher.
_DECIDED_ELSEWHERE = {
    "optimizer": "Task.optimizers() gives the optimizer, which may be one of DeepSpeed's own classes",
    "scheduler": "Task.optimizers() gives the schedule, as schedule= of an optimizer",
    "amp": "Fit(precision=) gives the precision",
    "torch_autocast": "Fit(precision='bf16') runs the forward pass under autocast",
    "elasticity": "it changes the batch size, and so the run: start as many ranks as you want, and resume='auto'",
    "hybrid_engine": "it replaces the task's modules",
    "checkpoint": "Fit(checkpoint=) saves, in a format that every strategy reads",
}
# DeepSpeed's section for each precision that it computes itself.
_SECTIONS = {"bf16-true": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class ZeroSettings:
    """The arguments of ``DeepSpeed(...)`` that its configuration could give too.

    Attributes:
        stage: None leaves it to the configuration.
        offload_optimizer, offload_parameters: False leaves it to the configuration.
    """

    stage: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False


def check_settings(settings: ComputeSettings, stage: int) -> None:
    """Refuse settings that DeepSpeed does not support.

    Raises:
        OptionError: with the reason, and what to do.
    """
    precision = settings.precision.name
    if precision in ("fp64", "fp16-true"):
        raise OptionError(
            f"precision={precision!r}: DeepSpeed's optimizers keep single precision. Take 'fp32', "
            "'bf16', 'bf16-true' or 'fp16', or strategy='ddp'"
        )
    if settings.clip_value is not None:
        raise OptionError(
            f"clip_value={settings.clip_value!r}: DeepSpeed clips by the norm of all gradients "
            "alone. Take clip_norm=, or strategy='ddp' or 'fsdp'"
        )
    if stage == 3 and settings.compile is not None:
        raise OptionError(
            "compile: under stage 3 parameters come and go within the forward pass, by hooks that "
            "torch.compile cannot trace. Take stage=2, or strategy='fsdp'"
        )


def read_config(given: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """Return a copy of the configuration, which may be given as the path of a JSON file.

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
            "object"
        )
    return found


def choose_stage(config: Mapping[str, Any], zero_settings: ZeroSettings) -> int:
    """Return the stage that the argument or the configuration gives; 2 if neither does.

    Raises:
        OptionError: the stage is unknown, the two differ, or a setting needs another stage.
    """
    zero = config.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise OptionError(
            f"DeepSpeed(config=...): zero_optimization is {zero!r}: give an object with 'stage'"
        )
    argument, configured = zero_settings.stage, zero.get("stage", "auto")
    if argument is not None and configured not in ("auto", argument):
        raise OptionError(
            f"DeepSpeed(stage={argument!r}) and zero_optimization.stage={configured!r} in its "
            "config differ: leave one of them out"
        )
    stage = argument if argument is not None else configured
    stage = 2 if stage == "auto" else stage
    if stage == 0 and type(stage) is int:
        raise OptionError(
            "DeepSpeed(stage=0) shards nothing, which is strategy='ddp'; and in bf16, DeepSpeed "
            "0.19 takes a step of the optimizer before the first one. Give stage 1, 2 or 3"
        )
    if type(stage) is not int or stage not in STAGES:
        raise OptionError(
            f"DeepSpeed(stage={stage!r}): give 1 (shards optimizer state), 2 (gradients too) or 3 "
            "(parameters too)"
        )
    if zero_settings.offload_parameters and stage != 3:
        raise OptionError(
            f"DeepSpeed(stage={stage}, offload_parameters=True): parameters are sharded, and can "
            "be kept in the CPU's memory, under stage 3 alone"
        )
    return stage


def resolve(
    given: Mapping[str, Any],
    zero_settings: ZeroSettings,
    settings: ComputeSettings,
    world_size: int,
    *,
    pin: bool,
) -> dict[str, Any]:
    """Return the whole configuration for ``deepspeed.initialize``.

    "auto" takes Fit's value if Fit has one, else DeepSpeed's default.

    Args:
        given: the user's configuration.
        pin: whether memory on the CPU is pinned for copies to a GPU.

    Raises:
        OptionError: the configuration has a section that Fit or the Task decides, contradicts Fit,
            or asks for what cannot be saved.
    """
    for section, reason in _DECIDED_ELSEWHERE.items():
        if section in given:
            raise OptionError(
                f"DeepSpeed(config=...) has a section {section!r}: leave it out, {reason}"
            )
    config = _without_auto(copy.deepcopy(dict(given)))
    config.update(_batch_sizes(config, settings, world_size))
    # Without a value of its own, DeepSpeed would clip to a norm of 1.
    clip = settings.clip_norm or 0.0
    source = f"Fit(clip_norm={settings.clip_norm!r})"
    _check_agrees(config, "gradient_clipping", clip, source=source)
    config["gradient_clipping"] = clip
    _set_precision(config, settings)
    zero = config.setdefault("zero_optimization", {})
    zero["stage"] = choose_stage(given, zero_settings)
    if zero_settings.offload_optimizer:
        zero.setdefault("offload_optimizer", {"device": "cpu", "pin_memory": pin})
    if zero_settings.offload_parameters:
        zero.setdefault("offload_param", {"device": "cpu", "pin_memory": pin})
    _check_can_be_saved(config, settings)
    config["zero_allow_untested_optimizer"] = True
    # The optimizer is the task's.
    config["zero_force_ds_cpu_optimizer"] = False
    config.setdefault("steps_per_print", 10**9)
    return config


def _without_auto(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_auto(item) if isinstance(item, dict) else item
        for key, item in value.items()
        if item != "auto"
    }


def _check_agrees(config: Mapping[str, Any], key: str, value: Any, *, source: str) -> None:
    if key in config and config[key] != value:
        raise OptionError(
            f"DeepSpeed(config=...) has {key}={config[key]!r}, and {source} makes that {value!r}: "
            "make them the same, or write 'auto'"
        )


def _check_can_be_saved(config: Mapping[str, Any], settings: ComputeSettings) -> None:
    zero = config["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        if (zero.get(part) or {}).get("device") == "nvme":
            raise OptionError(
                f"DeepSpeed(config=...): {part}.device='nvme' swaps state to files that a "
                "checkpoint cannot reach: give 'cpu'"
            )
    if zero.get("zenflow") is not None:
        raise OptionError(
            "DeepSpeed(config=...): zenflow updates parameters out of step, so no step could be "
            "resumed: leave it out"
        )
    accumulates_in = (config.get("data_types") or {}).get("grad_accum_dtype")
    in_fp32 = settings.precision.name == "bf16-true" and accumulates_in in ("fp32", "float32")
    if zero["stage"] == 1 and in_fp32:
        raise OptionError(
            "DeepSpeed(stage=1) with data_types.grad_accum_dtype='fp32' under "
            "precision='bf16-true' is another engine (BF16_Optimizer), which begins with a step of "
            "its own: give stage=2"
        )


def _batch_sizes(
    config: Mapping[str, Any], settings: ComputeSettings, world_size: int
) -> dict[str, int]:
    """Return the three sizes that DeepSpeed asks for; two of them give the third."""
    size, accumulate = settings.batch_size, settings.accumulate
    source = f"Fit(batch_size={size}, accumulate={accumulate}) on {world_size} rank(s)"
    total = settings.global_batch_size
    if total is not None:
        accumulate = max(1, total // (size * world_size))
        source = f"Fit(batch_size={size}, global_batch_size={total}) on {world_size} rank(s)"
    sizes = {
        "train_micro_batch_size_per_gpu": size,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": size * accumulate * world_size,
    }
    for key, value in sizes.items():
        _check_agrees(config, key, value, source=source)
    return sizes


def _set_precision(config: dict[str, Any], settings: ComputeSettings) -> None:
    wanted = _SECTIONS.get(settings.precision.name)
    for section in ("bf16", "fp16"):
        part = config.setdefault(section, {})
        if part.get("enabled") not in (None, section == wanted):
            name = next(name for name, theirs in _SECTIONS.items() if theirs == section)
            raise OptionError(
                f"DeepSpeed(config=...) has {section}.enabled={part['enabled']!r}, and "
                f"Fit(precision={settings.precision.name!r}); {section}.enabled is "
                f"precision={name!r} here: make them the same, or write 'auto'"
            )
        part["enabled"] = section == wanted
    if wanted == "bf16":
        if config["bf16"].get("check_grad_overflow") is False:
            raise OptionError(
                "DeepSpeed(config=...) has bf16.check_grad_overflow=False, which lets a gradient "
                "that is not finite reach the parameters: leave it out"
            )
        config["bf16"]["check_grad_overflow"] = True
