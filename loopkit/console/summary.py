"""The summary of a run at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loopkit.console.text import columns, duration, number, pad, width

if TYPE_CHECKING:
    from loopkit.result import Result

_PARTS = {"compute": "forward+backward"}


def result_summary(result: Result) -> str:
    """Return the outcome of a run as lines to read: metrics, files, and the time of a step."""
    status = f"{result.status}: {result.reason}" if result.reason else result.status
    by_room = {
        room: {name: value for name, value in result.metrics.items() if name.startswith(room)}
        for room in ("eval/", "train/")
    }
    blocks = {
        status: _head(result),
        "eval metrics": _aligned(by_room["eval/"]),
        "train metrics": _aligned(by_room["train/"]),
        "best": _best(result.best),
        "time per step": _time_per_step(result.timings),
    }
    cells = max(width(name) for lines in blocks.values() for name in lines)
    text = []
    for title, lines in blocks.items():
        if lines:
            text.append(f"***** {title} *****")
            text += [f"  {pad(name, cells)} = {value}" for name, value in lines.items()]
    return "\n".join(text)


def _head(result: Result) -> dict[str, str]:
    progress = result.progress
    steps_per_second = progress.step / progress.seconds if progress.seconds else 0.0
    tokens = f", {progress.tokens:,} tokens" if progress.tokens else ""
    lines = {
        "steps": f"{progress.step:,} ({progress.epoch:,} epoch{'s' * (progress.epoch != 1)})",
        "time": f"{duration(progress.seconds)} ({steps_per_second:,.1f} steps/s)",
        "samples": f"{progress.samples:,}{tokens}",
    }
    if result.run_dir is not None:
        lines["run"] = str(result.run_dir)
    if result.checkpoint is not None:
        lines["checkpoint"] = str(result.checkpoint)
    return lines


def _aligned(values: Mapping[str, float]) -> dict[str, str]:
    """Return numbers of equal width, so that those with four decimals have their points aligned."""
    texts = {name: number(value) for name, value in sorted(values.items())}
    cells = max(map(width, texts.values()), default=0)
    return {name: pad(text, cells, right=True) for name, text in texts.items()}


def _best(best: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(best.get("value"), (int, float)):
        return {}
    name = str(best.get("metric", best.get("name", "value")))
    text = number(best["value"]) + (f" at step {best['step']:,}" if "step" in best else "")
    lines = {name: text}
    if best.get("checkpoint"):
        lines["best checkpoint"] = str(best["checkpoint"])
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
