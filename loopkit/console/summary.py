"""The summary of a run at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loopkit.console.text import amount, byte_size, columns, number, pad, width

if TYPE_CHECKING:
    from loopkit.result import Result

_PARTS = {"compute": "forward+backward"}


@dataclass(frozen=True)
class Best:
    """The best evaluation of a run: by ``Checkpoint(best=)``, or else by the lowest loss.

    Attributes:
        checkpoint: its checkpoint; None if none was kept.
    """

    metric: str
    value: float
    step: int | None
    checkpoint: Path | None


def best_of(result: Result) -> Best | None:
    """Return the best evaluation of a run; None if it was not evaluated."""
    known = result.best
    if isinstance(known.get("value"), (int, float)):
        kept = known.get("checkpoint")
        name = str(known.get("metric", known.get("name", "value")))
        return Best(name, known["value"], known.get("step"), Path(kept) if kept else None)
    losses = [
        (row["eval/loss"], row["step"])
        for row in result.history
        if isinstance(row.get("eval/loss"), (int, float)) and math.isfinite(row["eval/loss"])
    ]
    if not losses:
        return None
    value, step = min(losses)
    kept = None if result.checkpoint is None else result.checkpoint.with_name(f"step-{step:012}")
    return Best("eval/loss", value, step, kept if kept is not None and kept.is_dir() else None)


def result_summary(result: Result) -> str:
    """Return the outcome of a run as lines to read: metrics, files, times, and what to type next."""
    status = f"{result.status}: {result.reason}" if result.reason else result.status
    by_room = {
        room: {name: value for name, value in result.metrics.items() if name.startswith(room)}
        for room in ("eval/", "train/")
    }
    blocks = {
        status: head_lines(result),
        "eval metrics, of the last evaluation": _aligned(by_room["eval/"]),
        f"train metrics, {_logged(result)}": _aligned(by_room["train/"]),
        "best": _best_lines(result),
        "time per step": _time_per_step(result.timings),
        "next": result.next_lines,
    }
    cells = max(width(name) for lines in blocks.values() for name in lines)
    text = []
    for title, lines in blocks.items():
        if lines:
            text.append(f"***** {title} *****")
            text += [f"  {pad(name, cells)} = {value}" for name, value in lines.items()]
    return "\n".join(text)


def head_lines(result: Result) -> dict[str, str]:
    """Return how long the run was, how much it saw and held, and where it is."""
    progress = result.progress
    runtimes = [row["eval/runtime"] for row in result.history if "eval/runtime" in row]
    evaluating = min(math.fsum(runtimes), progress.seconds)
    training = progress.seconds - evaluating
    per_second = progress.step / training if training else 0.0
    tokens = f", {progress.tokens:,} tokens" if progress.tokens else ""
    lines = {
        "steps": f"{progress.step:,} ({progress.epoch:,} epoch{'s' * (progress.epoch != 1)})",
        "training": f"{amount('runtime', training)} ({per_second:,.1f} steps/s)",
    }
    if runtimes:
        count = len(runtimes)
        lines["evaluation"] = (
            f"{amount('runtime', evaluating)} ({count:,} evaluation{'s' * (count != 1)})"
        )
    lines["samples"] = f"{progress.samples:,}{tokens}"
    if result.peak_memory is not None:
        lines["peak memory"] = byte_size(result.peak_memory)
    if result.run_dir is not None:
        lines["run"] = str(result.url or result.run_dir)
    if result.checkpoint is not None:
        lines["checkpoint"] = str(result.checkpoint)
    return lines


def _logged(result: Result) -> str:
    """Return over which steps the training metrics are means: those of the last log."""
    steps = sorted({row["step"] for row in result.history if any("train/" in name for name in row)})
    if not steps:
        return "of the last log"
    first = steps[-2] + 1 if len(steps) > 1 else steps[-1]
    return (
        f"mean of steps {first:,} to {steps[-1]:,}" if first < steps[-1] else f"of step {first:,}"
    )


def _aligned(values: Mapping[str, float]) -> dict[str, str]:
    """Return numbers of equal width, so that those with four decimals have their points aligned."""
    texts = {name: amount(name, value) for name, value in sorted(values.items())}
    plain = [text for text in texts.values() if " " not in text]
    cells = max(map(width, plain), default=0)
    return {
        name: text if " " in text else pad(text, cells, right=True) for name, text in texts.items()
    }


def _best_lines(result: Result) -> dict[str, str]:
    best = best_of(result)
    if best is None:
        return {}
    at = "" if best.step is None else f" at step {best.step:,} of {result.step:,}"
    lines = {best.metric: number(best.value) + at}
    if best.checkpoint is not None:
        lines["best checkpoint"] = str(best.checkpoint)
    elif result.checkpoint is not None:
        lines["best checkpoint"] = "not kept: Checkpoint(best='eval/loss:min') keeps it"
    return lines


def _time_per_step(timings_us: Mapping[str, float]) -> dict[str, str]:
    """Return the microseconds per step and their share by part; "step" is their sum."""
    parts = {_PARTS.get(name, name): us for name, us in timings_us.items() if name != "step"}
    total = timings_us.get("step", sum(parts.values()))
    if not total:
        return {}
    parts["in all"] = total
    rows = [[f"{us:,.0f} µs", f"{us / total:.1%}"] for us in parts.values()]
    return dict(zip(parts, columns(rows, [True, True])))
