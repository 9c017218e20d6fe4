"""The lines that open and close a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.console.eta import total_steps
from loopkit.console.summary import count_parameters
from loopkit.console.text import duration
from loopkit.console.text import number as shown
from loopkit.task import name_of

if TYPE_CHECKING:
    from loopkit.run import Run


def opening(run: Run) -> list[str]:
    """What is trained, where and for how long, and where a resumed run goes on."""
    strategy, length = run.strategy, run.length
    ranks = f" x {strategy.world_size}" if strategy.world_size > 1 else ""
    place = f"{strategy.device}, {strategy.settings.precision.name}, {strategy.name}{ranks}"
    lengths = []
    if length.epochs is not None:
        lengths.append(f"{length.epochs:g} epoch{'s' * (length.epochs != 1)}")
    steps = total_steps(length)
    if steps is not None:
        lengths.append(f"{steps:,} step{'s' * (steps != 1)}")
    if length.seconds is not None:
        lengths.append(f"at most {duration(length.seconds)}")
    lines = [f"{name_of(run.task)}: {count_parameters(run.task)}", f"  on       {place}"]
    numbered = [
        pair for optimizer in run.optimizers.values() for pair in enumerate(optimizer.param_groups)
    ]
    groups = [
        f"{g.get('name', number)} {sum(p.numel() for p in g['params']):,}" for number, g in numbered
    ]
    if len(groups) > 1:
        lines.append(f"  groups   {', '.join(groups)}")
    if lengths:
        lines.append(f"  for      {', '.join(lengths)}")
    if run.run_dir is not None:
        lines.append(f"  in       {run.run_dir}")
    if run.record.resumed_from is not None:
        lines.append(f"  resumed  {run.record.resumed_from}, at step {run.progress.step:,}")
    return lines


def closing(run: Run) -> str:
    """How the run ended."""
    progress, best = run.progress, run.record.best
    why = f" ({run.outcome.reason})" if run.outcome.reason else ""
    steps = f"{progress.step:,} step{'s' * (progress.step != 1)}"
    text = f"{run.outcome.status.capitalize()}{why}: {steps} in {duration(run.seconds())}"
    name, value = best.get("metric", best.get("name")), best.get("value")
    if isinstance(value, (int, float)):
        text += f", best {name or 'metric'} {shown(value)}"
        text += f" at step {best['step']:,}" if "step" in best else ""
    return text
