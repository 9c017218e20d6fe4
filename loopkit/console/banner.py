"""The lines that are printed at the start and at the end of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.console.eta import total_steps
from loopkit.console.layer_table import count_parameters
from loopkit.console.next_lines import continue_line
from loopkit.console.text import duration
from loopkit.console.text import number as shown
from loopkit.task import name_of

if TYPE_CHECKING:
    from loopkit.run import Run


def start_banner(run: Run) -> list[str]:
    """Return lines that say what is trained, where and for how long, and from where it resumes."""
    strategy, length = run.strategy, run.length
    ranks = f" x {strategy.world_size}" if strategy.world_size > 1 else ""
    hardware = f"{strategy.device}, {strategy.settings.precision.name}, {strategy.name}{ranks}"
    lengths = []
    if length.epochs is not None:
        lengths.append(f"{length.epochs:g} epoch{'s' * (length.epochs != 1)}")
    steps = total_steps(length)
    if steps is not None:
        lengths.append(f"{steps:,} step{'s' * (steps != 1)}")
    if length.seconds is not None:
        lengths.append(f"at most {duration(length.seconds)}")
    lines = [f"{name_of(run.task)}: {count_parameters(run.task)}", f"  on       {hardware}"]
    lines += _groups_line(run)
    if lengths:
        lines.append(f"  for      {', '.join(lengths)}")
    if run.run_dir is not None:
        lines.append(f"  in       {run.options.url or run.run_dir}")
    if run.options.url is not None:
        lines.append(f"  copy     {run.run_dir}")
    if run.record.resumed_from is not None:
        lines.append(f"  resumed  {run.record.resumed_from}, at step {run.progress.step:,}")
    elif run.options.resume == "auto":
        lines.append("  resumed  nothing: there is no checkpoint yet")
    return lines


def _groups_line(run: Run) -> list[str]:
    """Return a line about the parameter groups; nothing if there is one group."""
    counts = {
        str(group.get("name", index)): sum(p.numel() for p in group["params"])
        for optimizer in run.optimizers.values()
        for index, group in enumerate(optimizer.param_groups)
    }
    if counts.keys() == {"decay", "no_decay"}:
        return [
            f"  decay    of {counts['decay']:,} weights; {counts['no_decay']:,} in biases and norms "
            "have none"
        ]
    shown = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    return [f"  groups   {shown}"] if len(counts) > 1 else []


def end_banner(run: Run) -> list[str]:
    """Return lines that say how the run ended, and how to continue it if it was interrupted."""
    progress, best = run.progress, run.record.best
    reason = f" ({run.outcome.reason})" if run.outcome.reason else ""
    steps = f"{progress.step:,} step{'s' * (progress.step != 1)}"
    text = f"{run.outcome.status.capitalize()}{reason}: {steps} in {duration(run.seconds())}"
    name, value = best.get("metric", best.get("name")), best.get("value")
    if isinstance(value, (int, float)):
        text += f", best {name or 'metric'} {shown(value)}"
        text += f" at step {best['step']:,}" if "step" in best else ""
    continues = run.outcome.status == "interrupted" and run.checkpointer is not None
    return [
        text,
        *([continue_line(run.run_dir, run.options.url)] if continues and run.run_dir else []),
    ]
