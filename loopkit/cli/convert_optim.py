"""The optimizer and the schedule that a Trainer's arguments ask for, as Python source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from loopkit.cli.trainer_arguments import TrainerArguments
from loopkit.errors import OptionError, nearest

Notes = dict[str, str]

# The Trainer's names, with loopkit's constructor and its first arguments.
OPTIMIZERS: Mapping[str, tuple[str, str]] = {
    "adamw_torch": ("AdamW", ""), "adamw_torch_fused": ("AdamW", ""), "adamw_hf": ("AdamW", ""),
    "adamw_torch_xla": ("AdamW", ""), "adamw_torch_npu_fused": ("AdamW", ""), "adamw_apex_fused": ("AdamW", ""),
    "adafactor": ("Adafactor", ""), "sgd": ("SGD", ""), "adagrad": ("Adagrad", ""), "rmsprop": ("RMSprop", ""),
    "rmsprop_bnb": ("RMSprop", ""), "rmsprop_bnb_32bit": ("RMSprop", ""),
    "rmsprop_bnb_8bit": ("build", "'rmsprop_8bit'"), "adamw_bnb_8bit": ("build", "'adamw_8bit'"),
    "adamw_8bit": ("build", "'adamw_8bit'"), "paged_adamw_8bit": ("build", "'adamw_8bit', is_paged=True"),
    "paged_adamw_32bit": ("build", "'bitsandbytes.optim.PagedAdamW32bit'"),
    "paged_adamw": ("build", "'bitsandbytes.optim.PagedAdamW32bit'"),
    "lion": ("Lion", ""), "lion_32bit": ("Lion", ""), "lion_8bit": ("build", "'lion_8bit'"),
    "paged_lion_8bit": ("build", "'lion_8bit', is_paged=True"),
    "paged_lion_32bit": ("build", "'bitsandbytes.optim.PagedLion32bit'"),
    "ademamix": ("build", "'bitsandbytes.optim.AdEMAMix'"),
    "ademamix_8bit": ("build", "'bitsandbytes.optim.AdEMAMix8bit'"),
    "paged_ademamix_32bit": ("build", "'bitsandbytes.optim.PagedAdEMAMix32bit'"),
    "paged_ademamix_8bit": ("build", "'bitsandbytes.optim.PagedAdEMAMix8bit'"),
    "schedule_free_adamw": ("ScheduleFree", ""), "schedule_free_sgd": ("build", "'schedule_free_sgd'"),
    "schedule_free_radam": ("build", "'schedule_free_radam'"),
}  # fmt: skip
_ADAFACTOR = (
    "torch's Adafactor scales an update by the size of its parameter, and the Trainer's does not: "
    "the weights differ. For the Trainer's return transformers' Adafactor from the task's optimizers"
)
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "cosine_with_restarts": "cosine_restarts", "polynomial": "polynomial",
    "constant": "constant", "constant_with_warmup": "constant", "inverse_sqrt": "inverse_sqrt",
    "reduce_lr_on_plateau": "reduce_on_plateau", "cosine_with_min_lr": "cosine",
    "cosine_warmup_with_min_lr": "cosine", "warmup_stable_decay": "wsd",
}  # fmt: skip
_WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau")


def arguments_source(values: Mapping[str, str]) -> str:
    """Return ``a=1, b=2`` for the sources of arguments by name."""
    return ", ".join(f"{name}={value}" for name, value in values.items())


def optimizer_source(args: TrainerArguments, notes: Notes) -> str:
    """Return the source of the optimizer; what it cannot do is added to ``notes``.

    Raises:
        OptionError: no version of the Trainer has a schedule of that name.
    """
    name = "adafactor" if args["adafactor"] else str(args["optim"])
    known = name in OPTIMIZERS
    kind, first = OPTIMIZERS.get(name, ("AdamW", ""))
    if not known:
        notes["optim"] = (
            f"loopkit has no {name!r}, and AdamW stands here in its place: return the optimizer "
            "itself, or give OptimizerSpec its class"
        )
    elif name == "adafactor":
        notes["optim"] = _ADAFACTOR
    values = {"lr": repr(args["learning_rate"])}
    described = (kind + first).lower()
    if args["weight_decay"] or "adam" in described or "lion" in described:
        values["weight_decay"] = repr(float(args.peek("weight_decay") or 0.0))
    if "adam" in described or "lion" in described or kind == "ScheduleFree":
        _adam_values(args, described, values)
    values |= _schedule_values(args, kind, first, notes)
    return f"{kind}({', '.join(part for part in (first, arguments_source(values)) if part)})"


def _adam_values(args: TrainerArguments, described: str, values: dict[str, str]) -> None:
    """Add betas and eps, as the Trainer passes them; of AdEMAMix the three betas are its own."""
    if "ademamix" not in described:
        betas = (args["adam_beta1"], args["adam_beta2"])
        if betas != (0.9, 0.999) or "lion" in described:
            values["betas"] = repr(betas)
    if "lion" not in described and args.is_set("adam_epsilon"):
        values["eps"] = repr(args["adam_epsilon"])


def _schedule_values(args: TrainerArguments, kind: str, first: str, notes: Notes) -> dict[str, str]:
    """Return ``schedule=``; for schedule-free optimizers their own warmup."""
    if kind != "ScheduleFree" and "schedule_free" not in first:
        return {"schedule": schedule_source(args, notes)}
    steps = args.peek("warmup_steps") or 0
    if args.is_set("lr_scheduler_type"):
        notes["lr_scheduler_type"] = "a schedule-free optimizer keeps its rate"
    if steps < 1:
        return {}
    args.use("warmup_steps")
    return {"warmup_steps": str(int(steps))}


def schedule_source(args: TrainerArguments, notes: Notes) -> str:
    """Return the source of the schedule.

    Raises:
        OptionError: no version of the Trainer has a schedule of that name.
    """
    name = str(args["lr_scheduler_type"]).lower()
    if name == "greedy":
        notes["lr_scheduler_type"] = (
            "loopkit has no 'greedy'; reduce_on_plateau() stands here in its place"
        )
        name = "reduce_lr_on_plateau"
    if name not in SCHEDULES:
        raise OptionError(
            f"the Trainer has no lr_scheduler_type {name!r}.{nearest(name, SCHEDULES)}"
        )
    values = {}
    if name not in _WITHOUT_WARMUP:
        warmup = _warmup(args)
        if warmup:
            values["warmup"] = warmup
    elif args.is_set("warmup_steps") or args.is_set("warmup_ratio"):
        for each in ("warmup_steps", "warmup_ratio"):
            if args.is_set(each):
                notes[each] = f"the Trainer's {name} has no warmup either"
    values |= _kwargs(args, name, notes)
    return f"{SCHEDULES[name]}({arguments_source(values)})"


def _warmup(args: TrainerArguments) -> str:
    ratio, steps = args["warmup_ratio"] or 0, args["warmup_steps"] or 0
    if 0 < steps < 1:  # newer versions take a ratio here too
        ratio, steps = steps, 0
    if steps >= 1:
        return str(int(steps))
    return repr(f"{ratio * 100:g}%") if ratio else ""


def _kwargs(args: TrainerArguments, name: str, notes: Notes) -> dict[str, str]:
    """Return the arguments of ``lr_scheduler_kwargs``, by the names of loopkit's schedules."""
    given = dict(args["lr_scheduler_kwargs"] or {})
    lr = float(args.peek("learning_rate")) or 1.0

    def rate(value: float) -> str:
        return repr(float(f"{float(value) / lr:.12g}"))

    translated: dict[str, tuple[str, Callable[[Any], str]]] = {
        **{key: ("cycles", repr) for key in ("num_cycles",) if name.startswith("cosine")},
        **{key: (key, repr) for key in _SAME_KWARGS.get(name, ())},
    }
    if "min_lr" in name or name == "reduce_lr_on_plateau":
        translated |= {"min_lr": ("floor", rate), "min_lr_rate": ("floor", repr)}
    elif name == "polynomial":
        given.setdefault("lr_end", 1e-7)
        translated["lr_end"] = ("floor", rate)
    elif name == "warmup_stable_decay":
        translated |= {
            "num_decay_steps": ("decay", repr),
            "min_lr_ratio": ("floor", repr),
            "decay_type": ("shape", lambda kind: repr("1-sqrt" if kind == "1-sqrt" else kind)),
        }
    values = {}
    for key, value in given.items():
        if key in translated and value is not None:
            ours, source = translated[key]
            values[ours] = source(value)
        elif value is not None:
            notes[f"lr_scheduler_kwargs[{key!r}]"] = f"{SCHEDULES[name]}() has no such argument"
    if name == "cosine_warmup_with_min_lr":
        notes["lr_scheduler_type"] = "the warmup of cosine(floor=...) starts at a rate of 0"
    return values


_SAME_KWARGS = {
    "polynomial": ("power",),
    "inverse_sqrt": ("timescale",),
    "reduce_lr_on_plateau": ("factor", "patience", "threshold", "cooldown"),
}
