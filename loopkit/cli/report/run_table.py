"""A table of runs, a line for each, to sort and to filter."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from loopkit.cli.report.run_data import RunData, differing, is_number, is_quality
from loopkit.console.text import columns, cut, duration, number
from loopkit.errors import OptionError, nearest

_TESTS: dict[str, Callable[[Any, Any], bool]] = {
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_CONDITION = re.compile(r"(?P<name>[^<>=!]+)(?P<test>!=|<=|>=|<|>|=)(?P<value>.*)", re.DOTALL)
_MOST_SETTINGS = 6
LONGEST_CELL = 32


def facts(run: RunData) -> dict[str, Any]:
    """Return all of a run that can be sorted and filtered by, by name."""
    about = run.about
    first = {
        "run": run.place,
        "status": run.status,
        "task": about.get("task"),
        "started": about.get("started"),
        "time": run.seconds,
        "step": run.step,
        "best": run.best_value(),
        "host": about.get("host"),
    }
    return first | {n: v for n, v in (run.last | run.settings).items() if n not in first}


def run_table(runs: Sequence[RunData], names: Sequence[str]) -> list[str]:
    """Return a header and a line for each run: how it is, its best, and the settings that differ."""
    changed = [name for name in differing(runs) if name != "checkpoint"][:_MOST_SETTINGS]
    watched = dict.fromkeys(run.monitor.name for run in runs if run.best is not None)
    others = dict.fromkeys(
        name
        for run in runs
        for name in run.last
        if name.startswith("eval/") and is_quality(name) and name not in watched
    )
    shown = [*watched, *list(others)[:3]]
    head = ["run", "status", "started", "time", "step", *(f"best {n}" for n in watched)]
    table = [[*head, *(f"last {n}" for n in shown), *changed]]
    for run, name in zip(runs, names):
        started = str(run.about.get("started", "-"))[:16].replace("T", " ")
        time = "-" if run.seconds is None else duration(run.seconds)
        best = [run.best_value() if run.monitor.name == n else None for n in watched]
        cells = [_cell(value) for value in [*best, *(run.last.get(n) for n in shown)]]
        settings = [_cell(run.settings.get(n)) for n in changed]
        table.append([name, run.status, started, time, f"{run.step:,}", *cells, *settings])
    numbers = len(watched) + len(shown)
    right = [False, False, False, True, True, *(True for _ in range(numbers + len(changed)))]
    return columns(table, right)


def filtered(runs: Sequence[RunData], conditions: Sequence[str]) -> list[RunData]:
    """Return the runs that meet all conditions, such as "status=finished" and "lr>=1e-3".

    Raises:
        OptionError: a condition is not of that form, or no run has that name.
    """
    kept = list(runs)
    for condition in conditions:
        match = _CONDITION.fullmatch(condition)
        if match is None:
            raise OptionError(f"--where {condition}: give a condition such as lr=1e-3 or step>100")
        name, test, wanted = match["name"].strip(), _TESTS[match["test"]], match["value"].strip()
        _check_name(name, runs, "--where")
        kept = [run for run in kept if _meets(facts(run).get(name), test, wanted)]
    return kept


def sorted_by(runs: Sequence[RunData], name: str) -> list[RunData]:
    """Return the runs by a value, the smallest first; "-name" puts the largest first.

    Runs without the value come last.

    Raises:
        OptionError: no run has that name.
    """
    falling = name.startswith("-")
    name = name.removeprefix("-")
    _check_name(name, runs, "--sort")
    values: dict[int, Any] = {id(run): facts(run).get(name) for run in runs}
    having = [run for run in runs if values[id(run)] is not None]
    if not all(is_number(values[id(run)]) for run in having):
        values = {key: str(value) for key, value in values.items()}
    ordered = sorted(having, key=lambda run: values[id(run)], reverse=falling)
    return [*ordered, *(run for run in runs if run not in having)]


def _check_name(name: str, runs: Sequence[RunData], option: str) -> None:
    known = dict.fromkeys(each for run in runs for each in facts(run))
    if name not in known:
        raise OptionError(
            f"{option} {name}: no run has that.{nearest(name, known)} There is {', '.join(known)}"
        )


def _meets(value: Any, test: Callable[[Any, Any], bool], wanted: str) -> bool:
    if value is None:
        return test(wanted, "null") if test in (operator.eq, operator.ne) else False
    try:
        return test(float(value), float(wanted))
    except (TypeError, ValueError):
        return test(str(value), wanted)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return number(value)
    return cut(str(value), LONGEST_CELL)
