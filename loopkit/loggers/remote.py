"""RemoteLogger: a logger whose values go to a service, from a thread of its own, each of them once."""

from __future__ import annotations

import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from loopkit.errors import HungError, LoopkitError, missing_extra
from loopkit.files import write_file
from loopkit.loggers.base import Logger
from loopkit.loggers.serialize import numbers, plain

Row = tuple[dict[str, Any], int]
_MOST_WAITING = 100_000
_MOST_CELLS = 10_000


@dataclass
class Opening:
    """What a service is told when a run starts or goes on.

    Attributes:
        id: of the run there that is gone on with; None for a new one.
        hparams: plain and nested: "task", "hparams" and "options".
    """

    run_dir: Path
    id: str | None
    project: str
    name: str
    hparams: dict[str, Any]


class RemoteLogger(Logger, ABC):
    """Base of the loggers to services. Training never waits for one, and never fails with it.

    Everything is said to the service in one thread, in order. Its first failure is raised by the
    next call, upon which the run leaves the logger out. ``NAME.json`` in the run directory keeps
    which run of the service is written to and up to which step each value was handed over, so that
    a resumed run goes on there and says nothing twice. A run that starts from step 0 is a new one
    of the service.

    Args:
        project: what runs are kept under; None takes the service's own variable, or else the task's
            name.
        name: of the run; None takes the service's own variable, or else that of the run directory.
        timeout: how many seconds the end of a run waits for the service.

    Raises:
        MissingExtraError: the service's package is not installed.
    """

    package = ""
    extra = ""
    variables = ("", "")  # of the environment: the project, the run's name

    def __init__(
        self, project: str | None = None, name: str | None = None, timeout: float = 60.0
    ) -> None:
        if find_spec(self.package) is None:
            raise missing_extra(self.package, self.extra, type(self).__name__)
        self._project, self._run_name, self._timeout = project, name, timeout
        self._thread: threading.Thread | None = None
        self._status = "finished"

    @property
    def experiment(self) -> Any:
        """The service's own object of the run under way, for what loopkit does not log; waits until
        there is one.

        Raises:
            LoopkitError: no run is under way; HungError: the service does not answer. Or what the
                service raised.
        """
        if self._thread is None:
            raise LoopkitError(
                f"{type(self).__name__}.experiment is there while a run is under way"
            )
        if not self._opened.wait(self._timeout):
            raise HungError(f"{self.name} has not answered within {self._timeout:g} s")
        self._check()
        return self._service

    @property
    def run_id(self) -> str:
        """What the service calls the run under way; waits and raises as ``experiment``."""
        assert self.experiment is not None
        return str(self._ledger.id)

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Start a run of the service, or go on with the one that this run directory belongs to."""
        self._api = import_module(
            self.package
        )  # here: processes of a Loader are not forked amid an import
        self._ledger = ledger = _Ledger(Path(run_dir) / f"{self.name}.json", step)
        project, name = (
            given or os.environ.get(variable)
            for given, variable in zip((self._project, self._run_name), self.variables)
        )
        about = plain(hparams)
        opening = Opening(
            Path(run_dir),
            ledger.id,
            project or str(about.get("task", "loopkit")),
            name or _run_name(Path(run_dir)),
            about,
        )
        self._jobs: SimpleQueue[tuple[str, Any, int]] = SimpleQueue()
        self._opened = threading.Event()
        self._service: Any = None
        self._error: Exception | None = None
        self._status = "finished"
        self._thread = threading.Thread(
            target=self._work, args=(opening,), name=f"loopkit-{self.name}", daemon=True
        )
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hand a row to the thread."""
        self._put("row", dict(values), step)

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Hand arrays to the thread; what holds no numbers has no place here."""
        found = {name: numbers(value) for name, value in arrays.items()}
        self._put(
            "arrays",
            {name: a.copy() for name, a in found.items() if a is not None and a.size},
            step,
        )

    def end(self, status: str) -> None:
        """Note how the run went; ``close`` tells the service."""
        self._status = status

    def close(self) -> None:
        """Tell the service that the run is over, and wait ``timeout`` for it."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        self._jobs.put(("stop", self._status, 0))
        thread.join(self._timeout)
        self._check()
        if thread.is_alive():
            raise HungError(
                f"{self.name} has not taken everything within {self._timeout:g} s; what is left "
                "over may be lost there"
            )

    @abstractmethod
    def _start(self, opening: Opening) -> str:
        """Open the run with the service and set ``self._service``; returns the service's id of it."""

    def _send(self, rows: list[Row]) -> None:
        """Hand rows of numbers to the service."""

    def _send_array(self, name: str, array: Any, step: int) -> None:
        """Hand one array of numbers (float64, of any shape) to the service."""

    def _stop(self, status: str) -> None:
        """Close the run with the service."""

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _put(self, kind: str, what: Any, step: int) -> None:
        self._check()
        if self._jobs.qsize() > _MOST_WAITING:
            raise HungError(f"{self.name} takes nothing any more: {_MOST_WAITING} rows wait for it")
        self._jobs.put((kind, what, step))

    def _work(self, opening: Opening) -> None:
        try:
            self._ledger.id = self._start(opening)
            self._ledger.save()
            self._opened.set()
            while self._serve(self._waiting()):
                pass
        except (
            BaseException
        ) as error:  # a client that ends its process would end this thread alone, unheard
            self._error = (
                error
                if isinstance(error, Exception)
                else LoopkitError(f"{self.name} gave up: {error!r}")
            )
        finally:
            self._opened.set()

    def _waiting(self) -> list[tuple[str, Any, int]]:
        """All jobs that wait, at least one."""
        jobs = [self._jobs.get()]
        try:
            while True:
                jobs.append(self._jobs.get_nowait())
        except Empty:
            return jobs

    def _serve(self, jobs: list[tuple[str, Any, int]]) -> bool:
        rows: list[Row] = []
        for kind, what, step in jobs:
            if kind == "row":
                new = self._ledger.take(what, step)
                if new:
                    rows.append((new, step))
                continue
            if rows:
                self._send(rows)
                rows = []
            if kind == "stop":
                self._ledger.save()
                self._stop(what)
                return False
            for name, array in self._ledger.take(what, step).items():
                self._send_array(name, array, step)
        if rows:
            self._send(rows)
        self._ledger.save()
        return True


def drawn(api: Any, array: Any) -> Any:
    """A vector as the service's Histogram, a matrix of up to 10,000 cells as its Table; None for
    another array.
    """
    if array.ndim == 1 and np.isfinite(array).any():
        return api.Histogram(array[np.isfinite(array)])
    if array.ndim == 2 and array.size <= _MOST_CELLS:
        return api.Table(
            columns=[str(column) for column in range(array.shape[1])], data=array.tolist()
        )
    return None


class _Ledger:
    """A service's id of a run, and the last step of each value that was handed over, as a file."""

    def __init__(self, path: Path, step: int) -> None:
        known = json.loads(path.read_text(encoding="utf-8")) if step and path.exists() else {}
        self._path = path
        self.id: str | None = known.get("id")
        self._before: dict[str, int] = known.get("last", {})
        self._last = dict(self._before)

    def take(self, values: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Those values that no earlier attempt has handed over, and note them."""
        new = {name: value for name, value in values.items() if step > self._before.get(name, -1)}
        self._last |= dict.fromkeys(new, step)
        return new

    def save(self) -> None:
        text = json.dumps({"id": self.id, "last": self._last}) + "\n"
        write_file(self._path, [text.encode("utf-8")], durable=True)


def _run_name(run_dir: Path) -> str:
    """The directory's name; of numbered ones (runs/digits/3) the parent's too."""
    path = run_dir.absolute()
    return f"{path.parent.name}-{path.name}" if path.name.isdigit() else path.name
