"""The values that a progress display shows beside its bar: losses, rates, metrics, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopkit.console.text import byte_size, is_speed, number, width
from loopkit.devices import peak_memory

if TYPE_CHECKING:
    from loopkit.run import Run

_GAP = "   "
_LATE = ("grad_norm", "skipped_steps")


def shown_values(run: Run, tokens_per_second: float | None = None) -> dict[str, str]:
    """Return the values to show by name, the most important first.

    These are the training loss and the task's other training values, learning rates, metrics of the
    last evaluation, tokens per second and the peak memory of a GPU. On the CPU, training values are
    means over the last steps. Values on an accelerator are those of the last log, because reading
    newer ones would make the training wait.
    """
    metrics = {**run.metrics, **run.accumulator.newest()}
    training = {name.removeprefix("train/"): v for name, v in metrics.items() if _of_training(name)}
    rates = {name: v for name, v in metrics.items() if name == "lr" or name.startswith("lr/")}
    rates |= _rates_now(run)
    measured = {n: v for n, v in metrics.items() if n.startswith("eval/") and not is_speed(n)}
    late = {name: training.pop(name) for name in _LATE if name in training}
    if "loss" in training:
        training = {"loss": training.pop("loss"), **training}
    values = training | rates | measured | late
    found = {name: number(value) if value else "0" for name, value in values.items()}
    if tokens_per_second:
        found["tokens/s"] = f"{tokens_per_second:,.0f}"
    device = run.strategy.device
    memory = None if device.type == "cpu" else peak_memory(device)
    if memory is not None:
        found["memory"] = byte_size(memory)
    return found


def _rates_now(run: Run) -> dict[str, float]:
    """Return the learning rates of this moment, under the names of the log."""
    found = {name: each.param_groups[0]["lr"] for name, each in run.optimizers.items()}
    named = {"lr" if len(found) == 1 else f"lr/{name}": rate for name, rate in found.items()}
    return {name: rate for name, rate in named.items() if isinstance(rate, (int, float))}


def _of_training(name: str) -> bool:
    """Return whether a value is of the training steps: ``train/<name>``, or a name of its own."""
    return name.startswith("train/") or ("/" not in name and name not in ("lr", "epoch", "step"))


def values_line(values: dict[str, str], cells: int) -> str:
    """Return as many values as fit into ``cells``, and the number of those that do not."""
    parts = [f"{name} {text}" for name, text in values.items()]
    line = _GAP.join(parts)
    kept = len(parts)
    while kept and width(line) > cells:
        kept -= 1
        line = _GAP.join([*parts[:kept], f"+{len(parts) - kept} more"])
    return line if width(line) <= cells else ""
