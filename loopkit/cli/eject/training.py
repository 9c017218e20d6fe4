"""How the script takes a step, counts, saves and ends, as the templates need it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from loopkit.cli.eject.inspection import Inspected
from loopkit.cli.eject.layout import literal
from loopkit.cli.eject.refusals import has_step_end
from loopkit.cli.eject.schedule import length_text
from loopkit.durations import Duration
from loopkit.options import Options
from loopkit.task import overrides

_LOG_EVERY = 50


def training_context(found: Inspected, options: Options, reading: dict[str, Any]) -> dict[str, Any]:
    """Return what the templates of the step, of checkpoints and of ``main`` need.

    Args:
        found: the run.
        options: its options.
        reading: the context of the other templates.
    """
    ddp, task = reading["ddp"], found.run.task
    precision = found.run.strategy.settings.precision
    combined = ddp or reading["several"]
    context: dict[str, Any] = {
        "combined": combined,
        "weighted": _kind_of_weight(found.weight) if combined else None,
        "mapping": found.mapping,
        "autocast": None if precision.autocast is None else str(precision.autocast),
        "dtype": None if precision.storage is None else str(precision.storage),
        "fp16": precision.scaled,
        "tf32": precision.tf32,
        "deterministic": options.deterministic,
        "clip_norm": options.clip_norm,
        "clip_value": options.clip_value,
        "on_nan": _on_nan(options, fp16=precision.scaled),
        "propagate": options.on_nan != "ignore" and (ddp or precision.scaled),
        "device": _device(found, options, ddp=ddp),
        "configures": overrides(task, "configure_model"),
        "step_end": has_step_end(task),
        "train_mode": type(task).train is not nn.Module.train,
        "steps": _steps(options),
        "save_every": _save_every(options),
    }
    context |= {"scale": _scale(found.weight), "per_epoch": _per_epoch(reading)}
    context |= {"checked": _checked(reading | context), "call": _call(reading | context)}
    names = ["args.checkpoint", "model", "optimizers" if reading["loop"] else "optimizer"]
    rest = ["scheduler"] * reading["scheduler"] + ["scaler"] * precision.scaled
    return context | {"saved": [*names, "step", *rest], "loaded": [*names, *rest]}


def constants(options: Options, context: dict[str, Any]) -> str:
    """Return the assignments at the top of the script."""
    every = Duration.parse(options.log_every, "log_every")
    values = {
        "SEED": options.seed,
        "DATA_SEED": options.seed if options.data_seed is None else options.data_seed,
        "BATCH_SIZE": context["batch_size"],
        "ACCUMULATE": context["accumulation"],
        "GLOBAL_BATCH_SIZE": context["global_batch"],
        "SCALE": context["scale"] if context["weighted"] else None,
        "CLIP_NORM": options.clip_norm,
        "CLIP_VALUE": options.clip_value,
        "STEPS": options.steps,
        "EPOCHS": 1 if options.epochs is None and options.steps is None else options.epochs,
        "LOG_EVERY": int(every.amount) if every.unit == "step" else _LOG_EVERY,
    }
    if context["columns"] and not context["shuffle"]:
        values["DATA_SEED"] = None
    comments = {"SCALE": "  # any power of two near the weights gives the same bits"}
    return "\n".join(
        f"{name} = {literal(value)}{comments.get(name, '')}"
        for name, value in values.items()
        if value is not None
    )


def _kind_of_weight(weight: Any) -> str | None:
    if weight is None:
        return None
    return "tensor" if isinstance(weight, Tensor) else "number"


def _scale(weight: Any) -> float | None:
    return None if weight is None else 2.0 ** math.floor(math.log2(max(float(weight), 1.0)))


def _on_nan(options: Options, *, fp16: bool) -> str | None:
    # A loss scaler leaves such steps out by itself.
    unchecked = options.on_nan == "ignore" or (fp16 and options.on_nan == "skip")
    return None if unchecked else options.on_nan


def _device(found: Inspected, options: Options, *, ddp: bool) -> str:
    device = found.run.strategy.device
    fixed = options.accelerator != "auto" or not isinstance(options.strategy, str)
    if ddp and device.type == "cuda" and fixed:
        return 'torch.device("cuda", local_rank)'
    if fixed or device.type == "mps":
        return f'torch.device("{device}")'
    cuda = 'f"cuda:{local_rank}"' if ddp else '"cuda"'
    return f'torch.device({cuda} if torch.cuda.is_available() else "cpu")'


def _steps(options: Options) -> str:
    epochs = options.epochs
    if epochs is None and options.steps is None:
        epochs = 1
    if epochs is None:
        return "STEPS"
    whole = Fraction(str(epochs)).denominator == 1
    passes = "EPOCHS * per_epoch"
    if isinstance(epochs, float) or not whole:
        passes = f"math.ceil(Fraction({literal(str(epochs))}) * per_epoch)"
    return passes if options.steps is None else f"min(STEPS, {passes})"


def _save_every(options: Options) -> str | None:
    saves = options.saves()
    every = Duration.parse(saves.every, "every") if saves is not None else None
    if every is None or every.unit == "never":
        return None
    if every.unit == "second":
        return "per_epoch"
    return length_text(str(every), "steps", "per_epoch")


def _per_epoch(reading: dict[str, Any]) -> str:
    several, ddp = reading["several"], reading["ddp"]
    at_once = "BATCH_SIZE" + reading["world"]
    if reading["drop_last"]:
        whole = f"length // ({at_once})" if ddp else f"length // {at_once}"
        return f"math.ceil({whole} / {reading['accumulate']})" if several else whole
    if several:
        at_once += f" * {reading['accumulate']}"
    return (
        f"math.ceil(length / ({at_once}))" if several or ddp else f"math.ceil(length / {at_once})"
    )


def _checked(context: dict[str, Any]) -> list[str]:
    """Return the tensors of a step that must be finite."""
    losses = "*losses" if context["combined"] else "loss"
    if context["fp16"]:
        return [losses]
    found = "*gradients" if context["clip_norm"] is None else "norm"
    # Ranks see the losses of the others in their gradients.
    return [found] if context["ddp"] else [found, losses]


def _call(context: dict[str, Any]) -> tuple[str, list[str], str]:
    """Return the call of ``backward`` in ``main``, in the parts that ``fold`` takes."""
    return (
        "loss, weight = backward(" if context["weighted"] else "loss = backward(",
        list(_arguments(context)),
        ")",
    )


def _arguments(context: dict[str, Any]) -> Iterator[str]:
    ddp, weighted = context["ddp"], context["weighted"]
    index = "index" if context["combined"] else "0"
    yield "wrapped" if ddp else "model"
    yield "to_device(batch, device)"
    yield f"at_step(step, {index} * world + rank)" if ddp else f"at_step(step, {index})"
    if context["combined"] and (ddp or not weighted):
        yield "size"
    if context["combined"] and not weighted:
        yield "total"
    if ddp and not weighted:
        yield "world"
    if context["autocast"]:
        yield "device"
    if context["fp16"]:
        yield "scaler"
