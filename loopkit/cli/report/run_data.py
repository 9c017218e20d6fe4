"""RunData: what the files of a run directory say, without torch. Old runs may lack some of them."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from loopkit.errors import LoopkitError, LoopkitWarning
from loopkit.loggers.jsonl import read_rows
from loopkit.monitor import Monitor
from loopkit.run_file import COPY, RUN_FILE, read_run_file

ROWS, ARRAYS, HPARAMS = "metrics.jsonl", "metrics.arrays.jsonl", "hparams.json"
SPEED = ("runtime", "samples_per_second")  # the last parts of names that measure no quality
# Options that two runs may have apart and still be the same experiment.
_OWN_OPTIONS = {"run_dir", "resume", "progress", "loggers"}
_SEEDS = {"seed", "data_seed"}
_NO_RUN = f"there is no {RUN_FILE}, {ROWS}, {HPARAMS} or checkpoints in it"


@dataclass(frozen=True, eq=False)
class RunData:
    """A run as its files tell it.

    Attributes:
        path: the run directory.
        about: the content of run.json; of an older run, that of hparams.json.
        rows: the logged rows, in order.
        arrays: the rows of metrics that are arrays.
    """

    path: Path
    about: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = field(repr=False)
    arrays: Sequence[Mapping[str, Any]] = field(repr=False)

    @property
    def place(self) -> str:
        """The run directory as its user names it: a path, or the URL that ``path`` is a copy of."""
        copy = self.path / COPY
        return copy.read_text(encoding="utf-8").strip() if copy.exists() else str(self.path)

    @property
    def status(self) -> str:
        """The status as of now; "unknown" for a run without run.json."""
        return str(self.about.get("status", "unknown"))

    @property
    def options(self) -> dict[str, Any]:
        """Every option of the Fit."""
        return dict(self.about.get("options") or {})

    @property
    def hparams(self) -> dict[str, Any]:
        """The arguments of the task."""
        return dict(self.about.get("hparams") or {})

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Options and arguments of the task by name; an argument is "task.x" where both have x."""
        own = {
            f"task.{name}" if name in self.options else name: value
            for name, value in self.hparams.items()
        }
        return self.options | own

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """The starts of the run, oldest first.

        A process that was killed could not write how far it came: a later start or the rows say it.
        """
        found = [dict(attempt) for attempt in self.about.get("attempts") or []]
        reached = [each.get("from_step", 0) for each in found[1:]] + [self.step]
        for attempt, step in zip(found, reached):
            if attempt.get("status") == "killed":
                attempt["to_step"] = max(attempt.get("to_step", 0), step)
        return found

    @property
    def step(self) -> int:
        """The last step that is known."""
        progress = self.about.get("progress") or {}
        return max(int(progress.get("step", 0)), self.rows[-1]["step"] if self.rows else 0)

    @property
    def seconds(self) -> float | None:
        """Seconds of training with evaluating and saving; None if that is not known."""
        found = (self.about.get("progress") or {}).get("seconds")
        return float(found) if isinstance(found, (int, float)) else None

    @property
    def monitor(self) -> Monitor:
        """The run's own ``Checkpoint(best=)``; without one, the lowest loss."""
        text = str(self.options.get("checkpoint", ""))
        for quote in "'\"":
            _, found, rest = text.partition(f"best={quote}")
            if found:
                return Monitor.parse(rest.partition(quote)[0], "Checkpoint(best=)")
        return Monitor("eval/loss", "min")

    @cached_property
    def evaluations(self) -> list[Mapping[str, Any]]:
        """The rows of evaluations."""
        return [row for row in self.rows if any(name.startswith("eval/") for name in row)]

    @cached_property
    def best(self) -> Mapping[str, Any] | None:
        """The row of the best value of the monitor; None without any."""
        return next(iter(self.monitor.ranked(self.rows, lambda row: row)), None)

    @cached_property
    def last(self) -> dict[str, float]:
        """The last value of every name that was logged."""
        found: dict[str, float] = {}
        for row in self.rows:
            found.update({n: v for n, v in row.items() if is_number(v) and n not in AXES})
        return found

    def best_value(self) -> float | None:
        """Return the best value of the monitor; None without any."""
        return None if self.best is None else float(self.best[self.monitor.name])

    def gaps(self) -> list[tuple[float, float]]:
        """Return when the run did not run between its attempts, in seconds since 1970."""
        found = []
        for last, following in zip(self.attempts, self.attempts[1:]):
            ended, started = seconds_of(last.get("ended")), seconds_of(following.get("started"))
            if ended is not None and started is not None and started > ended:
                found.append((ended, started))
        return found


AXES = ("step", "time", "epoch")


def read_run(run_dir: Path) -> RunData:
    """Read a run directory.

    Raises:
        LoopkitError: there is no such directory, or nothing in it that a run writes.
    """
    if not run_dir.is_dir():
        raise LoopkitError(f"there is no run directory {run_dir}")
    about = _read_json(run_dir / HPARAMS)
    try:
        about |= read_run_file(run_dir)
    except LoopkitError as error:  # torn by a power cut: the other files still say much
        warnings.warn(str(error), LoopkitWarning, stacklevel=2)
    rows, arrays = _rows(run_dir / ROWS), _rows(run_dir / ARRAYS)
    if not about and not rows and not (run_dir / "checkpoints").is_dir():
        raise LoopkitError(f"{run_dir} holds no run: {_NO_RUN}")
    return RunData(run_dir, about, rows, arrays)


def find_runs(directory: Path) -> list[Path]:
    """Return the run directories in ``directory``: itself, or those at any depth below it.

    Raises:
        LoopkitError: there is no such directory.
    """
    if not directory.is_dir():
        raise LoopkitError(f"there is no run directory {directory}")
    found = []
    for folder, inner, files in os.walk(directory):
        if {RUN_FILE, ROWS, HPARAMS} & set(files) or "checkpoints" in inner:
            found.append(Path(folder))
            inner.clear()
        else:
            inner[:] = sorted(name for name in inner if not name.startswith("."))
    return sorted(found, key=_natural)


def differing(runs: Sequence[RunData]) -> list[str]:
    """Return the names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    absent = object()
    return [
        name
        for name in names
        if name not in _OWN_OPTIONS
        and len({repr(run.settings.get(name, absent)) for run in runs}) > 1
    ]


def same_but_seed(runs: Sequence[RunData]) -> list[list[int]]:
    """Return the numbers of runs that differ in seeds alone, group by group, in order."""
    groups: dict[str, list[int]] = {}
    for number, run in enumerate(runs):
        kept = {
            name: value
            for name, value in run.settings.items()
            if name not in _OWN_OPTIONS and name.removeprefix("task.") not in _SEEDS
        }
        groups.setdefault(repr((run.about.get("task"), sorted(kept.items()))), []).append(number)
    return list(groups.values())


def short_names(paths: Iterable[Path]) -> list[str]:
    """Return names for run directories: without the folders that all have in common."""
    resolved = [path.resolve() for path in paths]
    if len(resolved) == 1:
        return ["/".join(resolved[0].parts[-2:])]
    common = Path(os.path.commonpath([path.parent for path in resolved]))
    return [path.relative_to(common).as_posix() for path in resolved]


def seconds_of(timestamp: Any) -> float | None:
    """Return an ISO 8601 time as seconds since 1970; None if it is none."""
    try:
        return datetime.fromisoformat(str(timestamp)).timestamp()
    except ValueError:
        return None


def is_number(value: Any) -> bool:
    """Return whether a logged value is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_quality(name: str) -> bool:
    """Return whether a name of an evaluation is one of quality, not of speed."""
    return name.rpartition("/")[2] not in SPEED


def finite(value: float) -> float | None:
    """Return a number as JSON can hold it: None for NaN and infinities."""
    return value if math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise LoopkitError(f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    try:
        state = path.stat()
    except FileNotFoundError:
        return ()
    return _rows_of(path, state.st_mtime_ns, state.st_size, state.st_ino)


@lru_cache(maxsize=64)
def _rows_of(path: Path, *state: int) -> Sequence[Mapping[str, Any]]:
    """Read a file again only after it has changed."""
    return tuple(read_rows(path))


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """Return a key that sorts run 10 after run 9."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in path.parts]
