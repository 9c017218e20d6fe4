"""When the Trainer logs, evaluates and saves, as options of Fit."""

from __future__ import annotations

from loopkit.cli.convert_script import Conversion
from loopkit.cli.trainer_arguments import TrainerArguments


def convert_cadences(args: TrainerArguments, found: Conversion) -> None:
    """Convert when the Trainer logs, evaluates and saves, and which checkpoint is the best."""
    found.fit["log_every"] = _every(args, "logging_strategy", "logging_steps")
    old = args["evaluation_strategy"]
    if old and not args.is_set("eval_strategy"):
        args.given["eval_strategy"] = old
    eval_every = _every(args, "eval_strategy", "eval_steps", "logging_steps")
    found.fit["eval_every"] = eval_every
    if args.peek("eval_delay") and eval_every != "'never'":
        unit = "epochs" if "1 epoch" in eval_every else "steps"
        found.fit["eval_after"] = repr(f"{args['eval_delay']:g} {unit}")
    _convert_saving(args, found, eval_every)


def _convert_saving(args: TrainerArguments, found: Conversion, eval_every: str) -> None:
    strategy = str(args["save_strategy"]).lower()
    if strategy == "no":
        found.fit["checkpoint"] = "False"
        return
    found.checkpoint["every"] = _every(args, "save_strategy", "save_steps")
    if strategy == "best":
        found.checkpoint["every"] = eval_every
        found.notes["save_strategy"] = "it saves at each evaluation, and the best one is kept"
    found.checkpoint["keep"] = repr(args["save_total_limit"] or None)
    if args["save_only_model"]:
        found.checkpoint["weights_only"] = "True"
    load_best = args.peek("load_best_model_at_end")
    metric = args.peek("metric_for_best_model") or ("loss" if load_best else None)
    if metric and eval_every == "'never'":
        return  # the list of what is not carried over has them
    args.use("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    if metric:
        metric = str(metric).removeprefix("eval_")
        greater = args.peek("greater_is_better")
        greater = not metric.endswith("loss") if greater is None else greater
        found.metric = metric
        found.checkpoint["best"] = repr(f"eval/{metric}:{'max' if greater else 'min'}")
        if load_best:
            found.checkpoint["load_best"] = "True"


def _every(args: TrainerArguments, strategy: str, *steps: str) -> str:
    """Return the source of a cadence; ``steps`` are the arguments that give it, the first set."""
    kind = str(args[strategy]).lower()
    if kind in ("no", "none"):
        return "'never'"
    if kind in ("epoch", "best"):
        return "'1 epoch'"
    count = next(args[name] for name in steps if args.peek(name))
    return f"'{count * 100:g}%'" if 0 < float(count) < 1 else f"'{int(count)} steps'"
