"""RunKeeper: writes run.json from the start of a run to its end."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from loopkit.console.eta import total_steps
from loopkit.console.layer_table import count_parameters
from loopkit.devices import peak_memory
from loopkit.errors import LoopkitError, LoopkitWarning
from loopkit.events import Hook
from loopkit.files import rename_aside
from loopkit.fit.origin import commit, environment, hardware
from loopkit.loggers.serialize import jsonable
from loopkit.run import Run
from loopkit.run_file import RUN_FILE, read_run_file, timestamp, write_run_file
from loopkit.task import name_of

_EVERY = 5.0  # seconds between two writes while the run trains
_MOST_WARNINGS = 100


class RunKeeper(Hook):
    """Keeps run.json in the run directory, on rank 0: at the start, at logs, and at the end.

    The file says what runs, where and since when, and how each attempt ended. A plain step does
    not meet it. Logs come to it at most every 5 seconds.
    """

    may_request = False

    def __init__(self) -> None:
        self._warnings: dict[str, dict[str, Any]] = {}
        self._about: dict[str, Any] = {}
        self._directory = Path()
        self._written = 0.0

    @contextmanager
    def keeping_warnings(self) -> Iterator[None]:
        """Inside, warnings that are shown are kept too, each text once."""
        shown = warnings.showwarning

        def keep(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if len(self._warnings) < _MOST_WARNINGS:
                found = {"text": str(message), "kind": category.__name__, "time": _now()}
                self._warnings.setdefault(str(message), found)
            shown(message, category, filename, lineno, file, line)

        warnings.showwarning = keep
        try:
            yield
        finally:
            if warnings.showwarning is keep:
                warnings.showwarning = shown

    def open(self, run: Run) -> None:
        """Write the start of this attempt after those that the directory knows."""
        if run.strategy.rank != 0:
            return
        assert run.run_dir is not None
        self._directory = run.run_dir
        if run.options.resume is None:
            rename_aside(run.run_dir / RUN_FILE)
        earlier = self._earlier()
        resumed = run.record.resumed_from
        where = environment() | hardware(run)
        attempt = {
            "started": _now(),
            "ended": None,
            "status": "running",
            "reason": "",
            "from_step": run.progress.step,
            "resumed_from": None if resumed is None else str(resumed),
            **{name: where[name] for name in ("host", "command")},
        }
        parameters = count_parameters(run.task)
        self._about = {
            "format": 1,
            "status": "running",
            "reason": "",
            "started": earlier.get("started", attempt["started"]),
            "ended": None,
            "task": name_of(run.task),
            "parameters": {"total": parameters.total, "trainable": parameters.trainable},
            **where,
            "commit": commit(run.task),
            "hparams": jsonable(dict(run.task.hparams)),
            "options": jsonable(run.options.to_dict()),
            "attempts": [*earlier.get("attempts", []), attempt],
        }
        attempt["commit"] = self._about["commit"]
        self._write(run)

    def on_log(self, run: Run, values: Mapping[str, float]) -> None:
        """Write how far the run is, at most every 5 seconds."""
        if self._about and time.monotonic() - self._written >= _EVERY:
            self._write(run)

    def close(self, run: Run, error: BaseException | None) -> None:
        """Write how the run ended."""
        if not self._about:
            return
        outcome = run.outcome
        status, reason = outcome.status, outcome.reason
        if isinstance(error, KeyboardInterrupt):
            status, reason = "interrupted", "Ctrl-C, in the middle of a step"
        elif error is not None:
            status, reason = "failed", f"{type(error).__name__}: {error}"
        ending = {"status": status, "reason": reason, "ended": _now()}
        self._about.update(ending)
        self._about["attempts"][-1].update(ending)
        self._write(run)
        self._about = {}

    def _earlier(self) -> dict[str, Any]:
        """Return what the directory knows of earlier attempts. A file that is damaged is renamed."""
        try:
            return read_run_file(self._directory, held=True)
        except LoopkitError as error:
            rename_aside(self._directory / RUN_FILE)
            warnings.warn(
                f"{error}: it is renamed, and a new one started", LoopkitWarning, stacklevel=2
            )
            return {}

    def _write(self, run: Run) -> None:
        self._written = time.monotonic()
        progress, record = run.progress, run.record
        timings = record.timings.per_step() if record.timings.steps else {}
        counters = {
            "step": progress.step,
            "epoch": run.epochs_done() if run.loader is not None else progress.epoch,
            "samples": progress.samples,
            "tokens": progress.tokens,
            "seconds": round(run.seconds(), 3),
        }
        kept = {
            "to_step": progress.step,
            "timings": {name: round(us, 1) for name, us in timings.items()},
            "peak_memory": peak_memory(run.strategy.device),
            "warnings": list(self._warnings.values()),
        }
        self._about["attempts"][-1].update(kept)
        self._about |= {
            "progress": counters,
            "total_steps": total_steps(run.length),
            "best": jsonable(record.best),
            "class_names": list(record.class_names),
            "timings": kept["timings"],
            "peak_memory": kept["peak_memory"],
            "updated": _now(),
        }
        try:
            write_run_file(self._directory, self._about)
        except OSError as error:
            self._about = {}
            warnings.warn(
                f"{self._directory / RUN_FILE} cannot be written and is no longer kept: {error}",
                LoopkitWarning,
                stacklevel=2,
            )


def _now() -> str:
    return timestamp(time.time())
