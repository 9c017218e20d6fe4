"""``loopkit sweep TARGET NAME=A,B ...``: train with several values, and compare."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from loopkit.cli.args.axes import take_axes
from loopkit.cli.args.request import Command, Request, read_request
from loopkit.cli.args.tokens import Token, take_flag, take_value
from loopkit.cli.sweep.search import Search
from loopkit.cli.sweep.space import Space, drawn, grid, read_space
from loopkit.cli.sweep.trials import INTERRUPTED, Sweep, Trial
from loopkit.errors import OptionError
from loopkit.fit.fit import Fit
from loopkit.monitor import Monitor
from loopkit.storage import as_url

OWN = {
    "--random N": "try N random combinations, instead of all. A range such as lr=1e-5..1e-2:log "
    "or layers=2..8 needs it, or --optuna",
    "--optuna N": "let Optuna choose N combinations, and end hopeless runs early. Needs "
    "loopkit-torch[optuna]",
    "--metric NAME:MODE": "what decides. [default: that of --checkpoint.best, or eval/loss:min]",
    "--dir DIR": "the directory of the sweep. [default sweeps/<task>]",
    "--sweep-seed N": "the seed of --random and --optuna. [int, default 0]",
    "--json": "print the trials as JSON",
}
SWEEP = Command(
    "sweep",
    "Train with several values of options, one run after another, each in its own process. After "
    "TARGET come the values, as lr=1e-3,3e-3 hidden=32,64. The same command continues a sweep that "
    "was interrupted.",
    OWN,
    hidden=("run_dir", "resume", "dry_run"),
    examples=(
        "lr=1e-3,3e-3,1e-2 --epochs 5",
        "lr=1e-4..1e-1:log hidden=16..256 --random 20",
        "lr=1e-4..1e-1:log --optuna 30 --checkpoint.best eval/accuracy:max",
    ),
)


def run(argv: Sequence[str]) -> int:
    """Run the sweep; return the exit code, which is 1 if no trial gave the metric."""
    rest = list(argv)
    axes = take_axes(rest, "sweep") if rest and not rest[0].startswith("-") else {}
    request = read_request(SWEEP, rest)
    if request is None:
        return 0
    if not axes:
        raise OptionError("sweep: say after TARGET what to vary, as in lr=1e-3,3e-3 hidden=32,64")
    space, tokens = read_space(axes), request.tokens
    counts = {name: _count(tokens, name) for name in ("random", "optuna")}
    if all(counts.values()):
        raise OptionError("sweep: give --random or --optuna, not both")
    metric, where = take_value(tokens, "metric"), take_value(tokens, "dir")
    seed, as_json = _count(tokens, "sweep_seed", least=0) or 0, take_flag(tokens, "json")
    if as_url(where) is not None:
        raise OptionError(f"--dir {where} is a URL: a sweep keeps its runs on this machine")
    fit = Fit(**request.values().fit)
    monitor = fit.options.monitor() or Monitor("eval/loss", "min")
    if metric is not None:
        monitor = Monitor.parse(metric, "--metric")
    kind = next((name for name, count in counts.items() if count), "grid")
    about = {
        "target": request.target,
        "values": {name: ",".join(texts) for name, texts in axes.items()},
        "kind": kind,
        "seed": seed,
        "metric": str(monitor),
        "options": _words(request),
    }
    _refuse_given_twice(request, space)
    combinations = list(_combinations(kind, space, counts["random"] or 0, seed))
    for values in combinations:
        _check(request, values)
    directory = Path(where or Path("sweeps") / request.task.__name__.lower())
    sweep = Sweep.open(directory, about, monitor)
    if kind == "optuna":
        trials: Iterator[Trial] = Search(sweep, space, seed).trials(counts["optuna"] or 0)
    else:
        trials = _listed(sweep, combinations)
    interrupted = _run_all(sweep, trials, request)
    if as_json:
        print(json.dumps([asdict(trial) for trial in sweep.trials], indent=2), flush=True)
    else:
        print("\n".join(sweep.table()), flush=True)
    _say_how_to_continue(sweep, request.target, interrupted)
    return INTERRUPTED if interrupted else 0 if sweep.best() is not None else 1


def _run_all(sweep: Sweep, trials: Iterator[Trial], request: Request) -> bool:
    """Run the trials that are not over; return whether one was interrupted, which ends the sweep."""
    for trial in trials:
        given = [Token(name, value).argument for name, value in trial.values.items()]
        hooks = [] if trial.optuna is None else [_pruning(sweep, trial)]
        sweep.run(trial, [request.target, *_words(request), *given, *hooks])
        if trial.status == "interrupted":
            return True
    return False


def _pruning(sweep: Sweep, trial: Trial) -> str:
    journal = str(sweep.directory / Search.JOURNAL)
    return f"--hooks+=OptunaPrune({journal!r}, {str(sweep.monitor)!r}, number={trial.optuna})"


def _listed(sweep: Sweep, combinations: Sequence[dict[str, str]]) -> Iterator[Trial]:
    """Yield the trials of a list of combinations that are not over."""
    for number, values in enumerate(combinations, 1):
        if number > len(sweep.trials):
            sweep.trials.append(Trial(number, values))
    yield from [trial for trial in sweep.trials if not trial.over]


def _combinations(kind: str, space: Space, count: int, seed: int) -> Iterator[dict[str, str]]:
    if kind == "grid":
        return grid(space)
    return drawn(space, count, seed)


def _words(request: Request) -> list[str]:
    configs = [f"--config={path}" for path in request.configs]
    return [*configs, *(token.argument for token in request.tokens)]


def _refuse_given_twice(request: Request, space: Space) -> None:
    given = {token.name for token in request.tokens}
    for name in space:
        if name in given:
            raise OptionError(f"--{name} is given, and the sweep gives it to each run")


def _check(request: Request, values: dict[str, str]) -> None:
    """Check a combination before any run starts.

    Raises:
        OptionError: a name is unknown, or a value is not accepted.
    """
    added = [Token(name, value) for name, value in values.items()]
    Fit(**replace(request, tokens=[*request.tokens, *added]).values().fit)


def _say_how_to_continue(sweep: Sweep, target: str, interrupted: bool) -> None:
    if interrupted:
        print("loopkit: interrupted. The same command continues the sweep", file=sys.stderr)
    best = sweep.best()
    if best is not None:
        run_dir = shlex.quote(str(sweep.run_dir(best)))
        line = f"loopkit evaluate {shlex.quote(target)} --checkpoint {run_dir}"
        print(f"* is the best {sweep.monitor.name}. To measure it: {line}", file=sys.stderr)


def _count(tokens: list[Token], name: str, least: int = 1) -> int | None:
    text = take_value(tokens, name)
    if text is None:
        return None
    if not text.isdigit() or int(text) < least:
        shown = name.replace("_", "-")
        raise OptionError(f"--{shown} {text}: give a whole number of at least {least}")
    return int(text)
