"""``loopkit bench precision | memory | grid TARGET``: measure a task in short trainings."""

from __future__ import annotations

import itertools
import json
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from loopkit.cli.args.axes import take_axes
from loopkit.cli.args.config import Values
from loopkit.cli.args.request import Command, Request, read_request
from loopkit.cli.args.signature import parameters_of
from loopkit.cli.args.tokens import Token, take_value
from loopkit.cli.bench import plot, tables
from loopkit.cli.bench.tables import Row
from loopkit.cli.bench.worker import HIDDEN, WARM_UP
from loopkit.devices import find_device
from loopkit.errors import OptionError, RunDirError, nearest
from loopkit.fit.fit import Fit

logger = logging.getLogger(__name__)

# Each kind: what is typed after it, and what it shows.
KINDS = {
    "precision": ("TARGET", "time of a step, memory and loss in each precision"),
    "memory": ("TARGET", "bytes of parameters, gradients, optimizer state"),
    "grid": ("TARGET NAME=A,B ...", "time, memory and loss for each combination of values"),
}
USAGE = """usage: loopkit bench KIND TARGET [...]

{kinds}

Every line of a table is a real training of the task, in its own process.
loopkit bench KIND TARGET --help shows the options.
"""
PRECISIONS = ("fp32", "bf16", "fp16", "bf16-true", "fp16-true")
STORED = ("fp32", "bf16", "bf16-true")  # fp16 takes the bytes of bf16, fp16-true of bf16-true
SLOW = "float16 is very slow on a CPU, which has no arithmetic for it: it is meant for GPUs"
OWN = {
    "--steps N": f"measured steps of each run, after {WARM_UP} that do not count. [int, default 20]",
    "--limit SECONDS": "the time after which a run is stopped. [float, default 120]",
    "--json FILE": "also write the measured values to this file, as JSON",
    "--picture FILE": "also draw them to this file; its ending says the format. "
    "Needs matplotlib: loopkit-torch[plots]",
}
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Bench:
    """One call of the command, of which each combination of values is a run.

    Attributes:
        steps: measured steps of each run.
        limit: seconds that a run may take.
    """

    request: Request
    steps: int
    limit: float

    def check(self, changes: Mapping[str, str]) -> None:
        """Check a combination of values before any run starts.

        Raises:
            OptionError: a name is unknown or given twice, or a value is not accepted.
        """
        command = self.request.command.name
        given = [token.name for token in self.request.tokens]
        arguments = parameters_of(self.request.task)
        for name in (*changes, *given):
            if name.partition(".")[0] in HIDDEN and name not in arguments:
                raise OptionError(
                    f"{command}: {name} is not for a measured run, which trains --steps steps "
                    "on one device and does nothing else"
                )
        for name in changes:
            if name in given:
                raise OptionError(f"--{name} is given, and {command} gives it to each run")
        Fit(**self._values(changes).fit)

    def measure(self, changes: Mapping[str, str]) -> Row:
        """Train once with these values, in its own process."""
        shown = ", ".join(f"{name}={value}" for name, value in changes.items())
        print(f"loopkit: {shown} ...", file=sys.stderr, flush=True)
        logger.info("measuring %s", shown)
        argv = [self.request.target]
        argv += [f"--config={path}" for path in self.request.configs]
        argv += [token.argument for token in self._tokens(changes)]
        facts = run_worker(argv, self.steps, self.limit)
        accelerator = self._values(changes).fit.get("accelerator", "auto")
        half = changes.get("precision", "").startswith("fp16")
        note = SLOW if half and find_device(accelerator).type == "cpu" else ""
        labels = {name: "none" if value == "null" else value for name, value in changes.items()}
        return Row(labels, facts, note)

    def _tokens(self, changes: Mapping[str, str]) -> list[Token]:
        return [*self.request.tokens, *(Token(name, value) for name, value in changes.items())]

    def _values(self, changes: Mapping[str, str]) -> Values:
        return replace(self.request, tokens=self._tokens(changes)).values()


def run(argv: Sequence[str]) -> int:
    """Measure the target; return the exit code, which is 1 if no run could be measured."""
    if not argv or argv[0] in ("--help", "-h"):
        lines = [f"  {f'{kind} {takes}':<24}  {about}" for kind, (takes, about) in KINDS.items()]
        print(USAGE.format(kinds="\n".join(lines)), end="")
        return 0 if argv else 2
    kind, rest = argv[0], list(argv[1:])
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise OptionError(
            f"there is no command 'bench {kind}'.{nearest(kind, KINDS)} Commands: {known}"
        )
    precisions = PRECISIONS if kind == "precision" else STORED
    axes = take_axes(rest, "bench grid") if kind == "grid" else {"precision": list(precisions)}
    about = f"Train for a few steps in each of several ways, and show {KINDS[kind][1]}."
    request = read_request(Command(f"bench {kind}", about, OWN, hidden=HIDDEN), rest)
    if request is None:
        return 0
    if not axes:
        raise OptionError(
            "bench grid: say after TARGET what to vary, as in accumulate=2,4,8 precision=fp32,bf16"
        )
    tokens = request.tokens
    bench = Bench(
        request, _number(tokens, "steps", int, 20), _number(tokens, "limit", float, 120.0)
    )
    json_path = _file(tokens, "json")
    picture_path = _file(tokens, "picture")
    if picture_path is not None:
        plot.check(picture_path)
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
    if json_path is not None:
        head = {"bench": kind, "task": name, "steps": bench.steps}
        _write(json_path, json.dumps(tables.as_json(head, rows), indent=2) + "\n")
    if picture_path is not None:
        plot.draw(kind, name, rows, picture_path)
    return 0 if any(row.measured for row in rows) else 1


def run_worker(argv: Sequence[str], steps: int, limit: float) -> dict[str, Any]:
    """Measure a target in a fresh process, so that its peak memory is its own.

    Returns:
        The facts that ``worker.measure`` returns; only "problem" if the process failed or took
        longer than ``limit`` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="loopkit-bench-") as directory:
        result = Path(directory) / "result.json"
        command = [sys.executable, "-m", "loopkit.cli.bench.worker", str(result), str(steps), *argv]
        try:
            done = subprocess.run(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return {"problem": f"stopped after {limit:g} s (--limit)"}
        if result.exists():
            found: dict[str, Any] = json.loads(result.read_text())
            return found
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        guess = ": out of memory?" if name == "SIGKILL" else ""
        return {"problem": f"the process ended by {name}{guess}"}
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return {"problem": f"the process ended with code {done.returncode}: {last}"}


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunDirError(f"--json {path} cannot be written: {error.strerror}") from error


def _number(
    tokens: list[Token], name: str, kind: Callable[[str], Number], default: Number
) -> Number:
    text = take_value(tokens, name)
    if text is None:
        return default
    try:
        value = kind(text)
    except ValueError:
        value = kind("0")
    if not value > 0:
        accepted = "whole number" if kind is int else "number of seconds"
        raise OptionError(f"--{name} {text}: give a {accepted} above 0")
    return value


def _file(tokens: list[Token], name: str) -> Path | None:
    text = take_value(tokens, name)
    if text is None:
        return None
    path = Path(text)
    if path.is_dir():
        raise RunDirError(f"--{name} {text} cannot be written: it is a directory")
    if not path.parent.is_dir():
        raise RunDirError(f"--{name} {text} cannot be written: there is no directory {path.parent}")
    return path
