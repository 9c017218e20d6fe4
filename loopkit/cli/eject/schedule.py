"""The text of a schedule: the factor of the learning rate as a function of the step."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from loopkit.cli.eject.refusals import refuse
from loopkit.durations import Duration
from loopkit.optim.schedules import Schedule

# The fall from 1 to 0 of each schedule, in step, total, and what its constructor was given.
_FALLS: dict[str, Callable[[dict[str, Any]], str]] = {
    "cosine": lambda v: _cosine(v["cycles"]),
    "linear": lambda v: "(total - step) / total",
    "polynomial": lambda v: f"max(0.0, (total - step) / total) ** {v['power']!r}",
}
_DECAYS = {
    "linear": "1.0 - part",
    "cosine": "0.5 * (1.0 + math.cos(math.pi * part))",
    "1-sqrt": "1.0 - math.sqrt(part)",
}


def schedule_context(schedule: Schedule) -> dict[str, Any]:
    """Return what the template of a schedule needs.

    Raises:
        OptionError: the schedule is none of loopkit's.
    """
    if schedule.unit == "epoch" or schedule.from_start:
        raise refuse(
            f"the schedule {schedule.name!r}, which counts from the start or in epochs",
            "take one that counts steps, and put your own into the script's factor()",
        )
    values = _closure(schedule.shape)
    lengths = {n: length_text(v, "steps", "per_epoch") for n, v in schedule.lengths.items()}
    name = schedule.name
    lines = [f"{key} = {text}" for key, text in lengths.items()]
    floor = values.get("floor", 0.0)
    if name == "constant":
        lines = ["return 1.0"]
    elif name in _FALLS:
        lines.append(_above(floor, _FALLS[name](values)))
    elif name in _SHAPES:
        lines += _SHAPES[name](values)
    else:
        raise refuse(
            f"the schedule {name!r}, which is none of loopkit.optim's",
            "take one of them, and put your own into the script's factor()",
        )
    warmup = None if schedule.warmup in (0, None) else schedule.warmup
    start = schedule.start
    rise = None if warmup is None else length_text(warmup, "steps", "per_epoch")
    return {
        "about": name.replace("_", " "),
        "warmup": rise,
        "rise": "step / warmup" if not start else f"{start!r} + {1.0 - start!r} * step / warmup",
        "needs_total": any(re.search(r"\btotal\b", line) for line in lines),
        "needs_epoch": any("per_epoch" in line for line in [*lines, rise or ""]),
        "lines": lines,
    }


def length_text(value: object, steps: str, per_epoch: str) -> str:
    """Return a length in steps, rounded up, as an expression of the run's and the epoch's steps."""
    if not value:
        return "0"
    duration = Duration.parse(value, "length")
    amount, unit = duration.amount, duration.unit
    if unit == "step":
        return str(int(amount))
    whole = amount.denominator == 1
    factor = str(int(amount)) if whole else f'Fraction("{float(amount)!r}")'
    if unit == "percent":
        return f"math.ceil({factor} * {steps} / 100)"
    return (
        (per_epoch if amount == 1 else f"{factor} * {per_epoch}")
        if whole
        else (f"math.ceil({factor} * {per_epoch})")
    )


def _closure(function: Any) -> dict[str, Any]:
    """Return the values that the constructor of a schedule has bound, by name."""
    found = dict(inspect.getclosurevars(function).nonlocals)
    inner = found.get("shape")
    return found | _closure(inner) if inspect.isfunction(inner) else found


def _above(floor: float, fall: str) -> str:
    if not floor:
        return f"return max(0.0, {fall})"
    return f"return {floor!r} + (1 - {floor!r}) * max(0.0, {fall})"


def _cosine(cycles: float) -> str:
    wave = "math.pi * step / total"
    if cycles != 0.5:
        wave = f"math.pi * {cycles!r} * 2.0 * step / total"
    return f"0.5 * (1.0 + math.cos({wave}))"


def _cosine_restarts(values: dict[str, Any]) -> list[str]:
    wave = f"0.5 * (1.0 + math.cos(math.pi * ({values['cycles']!r} * step / total % 1.0)))"
    return [f"wave = {wave} if step < total else 0.0", _above(values["floor"], "wave")]


def _inverse_sqrt(values: dict[str, Any]) -> list[str]:
    return ["return 1.0 / math.sqrt((step + timescale) / timescale)"]


def _wsd(values: dict[str, Any]) -> list[str]:
    return [
        "decaying = step - (total - decay)",
        "part = min(1.0, decaying / max(1, decay))",
        f"fall = 1.0 if decaying < 0 else {_DECAYS[values['shape']]}",
        _above(values["floor"], "fall"),
    ]


def _warm_restarts(values: dict[str, Any]) -> list[str]:
    wave = "0.5 * (1.0 + math.cos(math.pi * {} / {}))"
    if values["T_mult"] == 1:
        return [_above(values["floor"], wave.format("(step % T_0)", "T_0"))]
    return [
        "since, period = float(step), float(T_0)",
        "while since >= period:",
        "    since -= period",
        f"    period *= {values['T_mult']!r}",
        _above(values["floor"], wave.format("since", "period")),
    ]


def _one_cycle(values: dict[str, Any]) -> list[str]:
    start, end = values["start"], values["end"]
    return [
        f"peak = {values['pct_start']!r} * total - 1.0",
        "if step <= peak:",
        "    wave = 1.0 + math.cos(math.pi * (step / peak))",
        f"    return 1.0 + ({start!r} - 1.0) / 2.0 * wave",
        "part = min(1.0, (step - peak) / max(1e-9, total - 1.0 - peak))",
        f"return {end!r} + (1.0 - {end!r}) / 2.0 * (1.0 + math.cos(math.pi * part))",
    ]


_SHAPES: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "cosine_restarts": _cosine_restarts,
    "inverse_sqrt": _inverse_sqrt,
    "wsd": _wsd,
    "warm_restarts": _warm_restarts,
    "one_cycle": _one_cycle,
}
