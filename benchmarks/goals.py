"""The goals of the benchmarks, and what the results on disk say of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, NamedTuple

TEXT = """
## The goals

Each line is a bound that loopkit sets itself, with the median that was measured. "By hand" is the best hand-written
loop of the same round. [Where the time goes](benchmark-profiles.md) shows why a goal is missed.

| measured | goal | median | met |
|---|---:|---:|---|
"""


class Goal(NamedTuple):
    """A bound on a median.

    Attributes:
        what: what is measured.
        bound: the largest good value, or the smallest one if ``at_least``.
        value: what was measured.
        shown: the format of both.
        at_least: whether larger is better.
    """

    what: str
    bound: float
    value: float
    shown: str = "{:.3f}"
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether the value, as it is shown, is good."""
        shown = float(self.shown.format(self.value).split()[0].replace(",", ""))
        return shown >= self.bound if self.at_least else shown <= self.bound


def table(found: dict[str, Any]) -> str:
    """Return the goals of all results in ``found``, by name, as a table."""
    goals = [goal for name, read in _GOALS.items() if name in found for goal in read(found[name])]
    rows = (
        f"| {goal.what} | {'at least' if goal.at_least else 'at most'} {goal.shown.format(goal.bound)} | "
        f"{goal.shown.format(goal.value)} | {'yes' if goal.met else '**no**'} |\n"
        for goal in goals
    )
    return TEXT + "".join(rows)


def _overhead(result: dict[str, Any]) -> Iterator[Goal]:
    for setting, rows in result["settings"].items():
        over = rows["loopkit"]["over"]["median"]
        yield Goal(f"a step over the one by hand, {setting}", 0, over, "{:+.0f} µs")


def _progress(result: dict[str, Any]) -> Iterator[Goal]:
    over = result["rows"]["loopkit"]["over"]["median"]
    yield Goal(
        "a step with its bar on a terminal, over the one by hand without", 20, over, "{:+.0f} µs"
    )


def _throughput(result: dict[str, Any]) -> Iterator[Goal]:
    for job, rows in result["jobs"].items():
        ours = rows["loopkit"]
        by_hand = ours["ratio"]["median"]
        yield Goal(f"{job}: samples/s, of those by hand", 1.0, by_hand, at_least=True)
        ahead = {
            name: median(mine / its for mine, its in zip(ours["rounds"], row["rounds"]))
            for name, row in rows.items()
            if name != "loopkit" and not name.startswith("by hand")
        }
        best = min(ahead, key=lambda name: ahead[name])
        what = f"{job}: samples/s, of the fastest peer ({best})"
        yield Goal(what, 1.0, ahead[best], at_least=True)


def _evaluation(result: dict[str, Any]) -> Iterator[Goal]:
    growth = result["rows"]["loopkit"]["growth"]
    yield Goal("memory of 900,000 more samples in an evaluation", 20, growth, "{:.0f} MB")


def _start(result: dict[str, Any]) -> Iterator[Goal]:
    resume = next(row for row in result["resume"] if row["name"] == "loopkit")
    what = f"resume after {resume['samples']:,} samples, to the first step"
    yield Goal(what, 1000, resume["seconds"]["median"] * 1e3, "{:,.0f} ms")


def _strategies(result: dict[str, Any]) -> Iterator[Goal]:
    for kind, rows in result["settings"].items():
        ratio = rows["loopkit"]["ratio"]["median"]
        yield Goal(f"{kind}: time of a step, of the one by hand", 1.02, ratio)


def _imports(result: dict[str, Any]) -> Iterator[Goal]:
    over = result["milliseconds"]["loopkit"]["over"]["median"]
    yield Goal("import, over that of torch", 70, over, "{:.0f} ms")


def _checkpoints(result: dict[str, Any]) -> Iterator[Goal]:
    rows = result["seconds"]
    durable, plain = rows["safetensors and fsync"]["save"], rows["safetensors"]["load"]
    ours = rows["loopkit"]
    ratio = ours["save"]["median"] / durable["median"]
    yield Goal("durable save, of safetensors with fsync", 1.2, ratio, "{:.2f}")
    ratio = ours["load"]["median"] / plain["median"]
    yield Goal("load and verify, of safetensors without", 2.0, ratio, "{:.2f}")


_GOALS: dict[str, Callable[[dict[str, Any]], Iterator[Goal]]] = {
    "overhead": _overhead,
    "progress": _progress,
    "throughput": _throughput,
    "evaluation": _evaluation,
    "start": _start,
    "strategies": _strategies,
    "import_time": _imports,
    "checkpoint": _checkpoints,
}
