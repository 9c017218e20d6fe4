"""The trials of a sweep: run one after another in processes, kept in a file, shown in a table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from loopkit.console.text import columns, number
from loopkit.errors import OptionError, RunDirError
from loopkit.files import write_file
from loopkit.loggers.jsonl import read_rows
from loopkit.monitor import Monitor

STATE = "sweep.json"
# The exit codes of a trial that a signal ended, and that the same command continues.
INTERRUPTED, PREEMPTED = 130, 143
OVER = ("finished", "pruned", "failed")


@dataclass
class Trial:
    """One combination of values.

    Attributes:
        number: from 1.
        values: as they are typed, by name.
        status: "waiting", "finished", "pruned", "failed" or "interrupted".
        best: the best value of the metric; None before the first.
        step: the step of the best value.
        optuna: the number of the trial in Optuna's study; None without one.
    """

    number: int
    values: dict[str, str]
    status: str = "waiting"
    best: float | None = None
    step: int | None = None
    optuna: int | None = None

    @property
    def over(self) -> bool:
        """Whether the trial has ended and is not continued."""
        return self.status in OVER


@dataclass
class Sweep:
    """All trials of a sweep, as its directory keeps them.

    Attributes:
        about: what was typed; a sweep is continued only with the same.
    """

    directory: Path
    about: dict[str, Any]
    monitor: Monitor
    trials: list[Trial] = field(default_factory=list)

    @classmethod
    def open(cls, directory: Path, about: dict[str, Any], monitor: Monitor) -> Sweep:
        """Begin a sweep, or read one that the directory holds.

        Raises:
            OptionError: the directory holds another sweep.
            RunDirError: it cannot be made, or its file cannot be read.
        """
        sweep, path = cls(directory, about, monitor), directory / STATE
        try:
            directory.mkdir(parents=True, exist_ok=True)
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return sweep
        except (OSError, ValueError) as error:
            raise RunDirError(f"{path} cannot be read: {error}") from error
        for name, value in about.items():
            if found["about"].get(name) != value:
                was = found["about"].get(name)
                raise OptionError(
                    f"{directory} holds another sweep: its {name} is {was!r}, and now {value!r}. "
                    "Give another --dir"
                )
        sweep.trials = [Trial(**each) for each in found["trials"]]
        return sweep

    def save(self) -> None:
        """Write the state of all trials."""
        state = {"about": self.about, "trials": [asdict(each) for each in self.trials]}
        write_file(self.directory / STATE, [json.dumps(state, indent=2).encode()])

    def run_dir(self, trial: Trial) -> Path:
        """Return the run directory of a trial."""
        return self.directory / f"{trial.number:03}"

    def run(self, trial: Trial, argv: Sequence[str]) -> None:
        """Train one trial in a process, continue it if it was interrupted, and note how it ended."""
        shown = ", ".join(f"{name}={value}" for name, value in trial.values.items())
        print(f"loopkit: trial {trial.number}: {shown}", file=sys.stderr, flush=True)
        words = [*argv, f"--run-dir={self.run_dir(trial)}", "--resume=auto"]
        code = run_process([sys.executable, "-m", "loopkit", "fit", *words])
        ends = {0: "finished", INTERRUPTED: "interrupted", PREEMPTED: "interrupted"}
        trial.status = ends.get(code, "failed")
        self._measure(trial)
        self.save()

    def _measure(self, trial: Trial) -> None:
        path = self.run_dir(trial) / "metrics.jsonl"
        for row in read_rows(path) if path.exists() else []:
            value = row.get(self.monitor.name)
            if isinstance(value, (int, float)) and self.monitor.is_better(value, trial.best):
                trial.best, trial.step = value, row["step"]

    def best(self) -> Trial | None:
        """Return the trial with the best value; None before the first."""
        found: Trial | None = None
        for trial in self.trials:
            if trial.best is not None and self.monitor.is_better(
                trial.best, None if found is None else found.best
            ):
                found = trial
        return found

    def table(self) -> list[str]:
        """Return a line for each trial, the best first; a star marks the best one."""
        measured = [trial for trial in self.trials if trial.best is not None]
        sign = 1 if self.monitor.mode == "min" else -1
        measured.sort(key=lambda trial: sign * (trial.best or 0.0))
        rest = [trial for trial in self.trials if trial.best is None]
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.values))
        rows = [["trial", *names, self.monitor.name, "step", "status", ""]]
        for trial in (*measured, *rest):
            value = "-" if trial.best is None else number(trial.best)
            step = "-" if trial.step is None else f"{trial.step:,}"
            star = "*" if trial is self.best() else ""
            values = [trial.values.get(name, "-") for name in names]
            rows.append([str(trial.number), *values, value, step, trial.status, star])
        right = [True, *(True for _ in names), True, True, False, False]
        return columns(rows, right)


def run_process(command: Sequence[str]) -> int:
    """Run a program and return its exit code. Ctrl-C and SIGTERM are passed on to it, each once.

    The program has a session of its own, so that a terminal does not send it Ctrl-C a second time.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    if threading.current_thread() is not threading.main_thread():
        return process.wait()

    def pass_on(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    before: Mapping[int, Any] = {
        number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
