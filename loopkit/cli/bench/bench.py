"""``loopkit bench precision | memory | grid TARGET``: what a task takes, measured in short
trainings of its own.
"""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from loopkit.cli.args.config import Values
from loopkit.cli.args.request import Command, Request, read_request
from loopkit.cli.args.signature import arguments_of
from loopkit.cli.args.tokens import Word, take_values
from loopkit.cli.bench import plot, tables
from loopkit.cli.bench.tables import Row
from loopkit.cli.bench.worker import HIDDEN, WARM_UP
from loopkit.devices import find_device
from loopkit.errors import OptionError, RunDirError, nearest
from loopkit.fit.fit import Fit

KINDS = {
    "precision": ("TARGET", "time of a step, memory and loss in every precision"),
    "memory": (
        "TARGET",
        "bytes of parameters, gradients and optimizer state; of parameters in 8 and 4 bits too",
    ),
    "grid": (
        "TARGET NAME=A,B NAME=C,D",
        "every combination of some values, of options of Fit or the task's arguments",
    ),
}
USAGE = """usage: loopkit bench KIND TARGET [...]

{kinds}

Every line of a table is a real training of the task, in a process of its own.
loopkit bench KIND TARGET --help shows the options.
"""
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-true", "fp16-true")
STORED = ("fp32", "bf16", "bf16-true")  # fp16 and fp16-true take the bytes of bf16 and bf16-true
SLOW = "float16 is very slow on a CPU, which has no arithmetic for it: it is meant for GPUs"
ABOUT = {
    "--steps N": f"how many steps of each run are measured, after {WARM_UP} that are not. [int, default 20]",
    "--limit SECONDS": "how long a run may take before it is given up. [float, default 120]",
    "--json FILE": "write what was measured there too, as JSON",
    "--picture FILE": "draw it there too; the ending says the format. Needs matplotlib: loopkit[plots]",
}
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Bench:
    """What all runs of one call have in common.

    Attributes:
        target: as it was typed.
        steps, limit: measured steps of each run; the seconds it may take.
    """

    request: Request
    target: str
    steps: int
    limit: float

    def check(self, changes: Mapping[str, str]) -> None:
        """Refuse what no run could be made with, before any is made.

        Raises:
            OptionError: an unknown name, a value that is not accepted, a name that is given twice.
        """
        request = self.request
        given = [word.name for word in request.words]
        own = arguments_of(request.task)
        for name in (*changes, *given):
            if name.partition(".")[0] in HIDDEN and name not in own:
                raise OptionError(
                    f"{request.command.name}: {name} is not for a measured run, which trains "
                    f"--steps "
                    "steps on one device and does nothing else"
                )
        for name in changes:
            if name in given:
                raise OptionError(
                    f"--{name} is given, and {request.command.name} gives it to each run"
                )
        Fit(**self._values(changes).fit)

    def measure(self, changes: Mapping[str, str]) -> Row:
        """Train once with these options, in a process of its own."""
        shown = ", ".join(f"{name}={value}" for name, value in changes.items())
        print(f"loopkit: {shown} ...", file=sys.stderr, flush=True)
        words = [f"--config={path}" for path in self.request.configs]
        words += [
            *(word.typed for word in self.request.words),
            *(f"--{n}={value}" for n, value in changes.items()),
        ]
        facts = run_apart([self.target, *words], self.steps, self.limit)
        accelerator = self._values(changes).fit.get("accelerator", "auto")
        half = changes.get("precision", "").startswith("fp16")
        note = SLOW if half and find_device(accelerator).type == "cpu" else ""
        return Row(
            {name: "none" if value == "null" else value for name, value in changes.items()},
            facts,
            note,
        )

    def _values(self, changes: Mapping[str, str]) -> Values:
        words = [*self.request.words, *(Word(name, value) for name, value in changes.items())]
        return replace(self.request, words=words).values()


def run(argv: Sequence[str]) -> int:
    """Measure the target; the exit code: 1 where nothing could be measured."""
    if not argv or argv[0] in ("--help", "-h"):
        lines = [f"  {f'{kind} {takes}':<31}  {about}" for kind, (takes, about) in KINDS.items()]
        print(USAGE.format(kinds="\n".join(lines)), end="")
        return 0 if argv else 2
    kind, words = argv[0], list(argv[1:])
    if kind not in KINDS:
        raise OptionError(
            f"there is no command 'bench {kind}'.{nearest(kind, KINDS)} Commands: "
            f"{', '.join(KINDS)}"
        )
    axes = (
        take_axes(words)
        if kind == "grid"
        else {"precision": list(PRECISIONS if kind == "precision" else STORED)}
    )
    about = f"Trains for a few steps in each of several ways, and shows {KINDS[kind][1]}."
    request, own = read_request(Command(f"bench {kind}", about, ABOUT, hidden=HIDDEN), words)
    if request is None:
        return 0
    if not axes:
        raise OptionError(
            "bench grid: say after TARGET what to vary, as in accumulate=2,4,8 activation_checkpointing=none,full"
        )
    bench = Bench(
        request, words[0], _number(own, "steps", int, 20), _number(own, "limit", float, 120.0)
    )
    as_json, picture = _file(own, "json"), _file(own, "picture")
    if picture is not None:
        plot.check(picture)
    if request.print_config:
        print(request.values().config, end="")
        return 0
    runs = [dict(zip(axes, chosen)) for chosen in itertools.product(*axes.values())]
    for changes in runs:
        bench.check(changes)
    rows = [bench.measure(changes) for changes in runs]
    name = request.task.__name__
    show = tables.memory if kind == "memory" else tables.speed
    print("\n".join(show(f"{name}: {bench.steps} steps", rows)))
    if as_json is not None:
        head = {"bench": kind, "task": name, "steps": bench.steps}
        _write(as_json, json.dumps(tables.as_json(head, rows), indent=2) + "\n")
    if picture is not None:
        plot.draw(kind, name, rows, picture)
    return 0 if any(row.measured for row in rows) else 1


def take_axes(words: list[str]) -> dict[str, list[str]]:
    """Remove ``name=a,b`` words, which follow the target; the values to try by name.

    ``none`` and nothing are null. A value that itself holds a comma cannot be given.

    Raises:
        OptionError: one is no ``name=a,b``, or a name comes twice.
    """
    axes: dict[str, list[str]] = {}
    while len(words) > 1 and not words[1].startswith("-"):
        name, equals, values = words.pop(1).partition("=")
        name = name.replace("-", "_")
        if not equals or not name:
            raise OptionError(
                f"bench grid: {name!r} is no name=a,b: say what to vary as in accumulate=2,4,8"
            )
        if name in axes:
            raise OptionError(
                f"bench grid: {name} is given twice: give its values at once, as in {name}=a,b"
            )
        axes[name] = ["null" if value in ("none", "") else value for value in values.split(",")]
    return axes


def run_apart(words: Sequence[str], steps: int, limit: float) -> dict[str, Any]:
    """Measure a target in a fresh process, so that its peak of memory is its own.

    Returns:
        What ``probe.measure`` found; a "problem" alone where the process ended without a word, or
        took too long.
    """
    with tempfile.TemporaryDirectory(prefix="loopkit-bench-") as place:
        result = Path(place) / "result.json"
        command = [
            sys.executable,
            "-m",
            "loopkit.cli.bench.worker",
            str(result),
            str(steps),
            *words,
        ]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"problem": f"given up after {limit:g} s (--limit)"}
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text())
            return found
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {
            "problem": f"the process ended by {name}"
            + (": out of memory?" if name == "SIGKILL" else "")
        }
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"problem": f"the process ended with code {done.returncode}: {last}"}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunDirError(f"--json {path} cannot be written: {error.strerror}") from error


def _one(words: list[Word], name: str) -> str | None:
    given = take_values(words, name)
    if len(given) > 1:
        raise OptionError(f"--{name} is given several times")
    return given[0] if given else None


def _number(words: list[Word], name: str, kind: Callable[[str], Number], default: Number) -> Number:
    text = _one(words, name)
    try:
        value = default if text is None else kind(text)
    except ValueError:
        value = kind("0")
    if not value > 0:
        raise OptionError(
            f"--{name} {text}: give a {'whole number' if kind is int else 'number of seconds'} "
            f"above 0"
        )
    return value


def _file(words: list[Word], name: str) -> Path | None:
    text = _one(words, name)
    if text is None:
        return None
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        why = "it is a directory" if path.is_dir() else f"there is no directory {path.parent}"
        raise RunDirError(f"--{name} {text} cannot be written: {why}")
    return path
