"""RemoteLogger: a logger that sends each value once to a service, from a thread of its own."""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from loopkit.errors import HungError, LoopkitError, LoopkitWarning, missing_extra
from loopkit.files import write_file
from loopkit.loggers.base import Logger
from loopkit.loggers.media import KINDS, Media, wav
from loopkit.loggers.serialize import jsonable, to_array

Row = tuple[dict[str, Any], int]
_MOST_WAITING = 100_000
_MOST_CELLS = 10_000


@dataclass
class RunInfo:
    """The facts that a service gets when a run starts or resumes.

    Attributes:
        id: the service's id of the run to continue; None for a new run.
        project: the name to keep the run under.
        name: of the run.
        hparams: JSON values, nested: "task", "hparams" and "options".
    """

    run_dir: Path
    id: str | None
    project: str
    name: str
    hparams: dict[str, Any]


class RemoteLogger(Logger, ABC):
    """Base class of the loggers to services. Training neither waits for one nor fails with it.

    One thread sends everything to the service, in order. Its first error is raised by the next
    call, and the run drops the logger. ``NAME.json`` in the run directory keeps the service's id of
    the run, and the last step that was sent for each value. So a resumed run continues the same run
    of the service and sends nothing twice. A run from step 0 is a new run of the service.

    Args:
        project: the name to keep runs under; None for the service's own variable, or else the name
            of the task.
        name: of the run; None for the service's own variable, or else the name of the run
            directory.
        timeout: how many seconds the end of a run waits for the service.

    Raises:
        MissingExtraError: the service's package is not installed.
    """

    media = KINDS
    package = ""
    extra = ""
    # The environment variables of the project and of the run's name.
    variables = ("", "")

    def __init__(
        self, project: str | None = None, name: str | None = None, timeout: float = 60.0
    ) -> None:
        if find_spec(self.package) is None:
            raise missing_extra(self.package, self.extra, type(self).__name__)
        self._project = project
        self._run_name = name
        self._timeout = timeout
        self._thread: threading.Thread | None = None
        self._status = "finished"
        self._reported: set[str] = set()

    @property
    def experiment(self) -> Any:
        """The service's own object of the current run, for values that loopkit does not log.

        Waits until the service has opened the run.

        Raises:
            LoopkitError: no run is open.
            HungError: the service does not answer within ``timeout``.
        """
        if self._thread is None:
            raise LoopkitError(f"{type(self).__name__}.experiment exists only during a run")
        if not self._opened.wait(self._timeout):
            raise HungError(f"{self.name} has not answered within {self._timeout:g} s")
        self._check()
        return self._service

    @property
    def run_id(self) -> str:
        """The service's id of the current run; waits and raises as ``experiment``."""
        assert self.experiment is not None
        return str(self._sent.id)

    def open(self, run_dir: Path, step: int, hparams: Mapping[str, Any]) -> None:
        """Start a run of the service, or continue the one that this run directory belongs to."""
        # Imported in this thread: a data worker must not be forked in the middle of an import.
        self._api = import_module(self.package)
        self._sent = _SentValues(Path(run_dir) / f"{self.name}.json", step)
        project, name = (
            given or os.environ.get(variable)
            for given, variable in zip((self._project, self._run_name), self.variables)
        )
        about = jsonable(hparams)
        info = RunInfo(
            run_dir=Path(run_dir),
            id=self._sent.id,
            project=project or str(about.get("task", "loopkit")),
            name=name or _default_name(Path(run_dir)),
            hparams=about,
        )
        self._jobs: SimpleQueue[tuple[str, Any, int]] = SimpleQueue()
        self._opened = threading.Event()
        self._service: Any = None
        self._error: Exception | None = None
        self._status = "finished"
        self._thread = threading.Thread(
            target=self._work, args=(info,), name=f"loopkit-{self.name}", daemon=True
        )
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Give a row to the thread."""
        self._put("row", dict(values), step)

    def log_arrays(self, arrays: Mapping[str, Any], step: int) -> None:
        """Give arrays of numbers to the thread."""
        found = {name: to_array(value) for name, value in arrays.items()}
        copies = {name: a.copy() for name, a in found.items() if a is not None and a.size}
        self._put("arrays", copies, step)

    def log_media(self, media: Media, step: int) -> None:
        """Give an image, a text, a histogram or audio to the thread."""
        self._put("media", {media.name: media}, step)

    def end(self, status: str) -> None:
        """Note how the run ended; ``close`` sends it to the service."""
        self._status = status

    def close(self) -> None:
        """Close the run of the service, and wait up to ``timeout`` until all values are sent.

        Raises:
            HungError: the service has not taken everything.
        """
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        self._jobs.put(("stop", self._status, 0))
        thread.join(self._timeout)
        self._check()
        if thread.is_alive():
            raise HungError(
                f"{self.name} has not taken everything within {self._timeout:g} s; "
                "the rest may be lost there"
            )

    @abstractmethod
    def _start(self, info: RunInfo) -> str:
        """Open the run with the service, set ``self._service``, and return the service's id."""

    def _send(self, rows: list[Row]) -> None:
        """Send rows of numbers to the service."""

    def _send_array(self, name: str, array: Any, step: int) -> bool:
        """Send one float64 array to the service; return False for a shape that it does not take."""
        return False

    def _send_media(self, media: Media, step: int) -> None:
        """Send an image, a text, a histogram or audio to the service."""

    def _stop(self, status: str) -> None:
        """Close the run with the service."""

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _put(self, kind: str, content: Any, step: int) -> None:
        self._check()
        if self._jobs.qsize() > _MOST_WAITING:
            raise HungError(f"{self.name} takes nothing any more: {_MOST_WAITING} rows wait for it")
        self._jobs.put((kind, content, step))

    def _work(self, info: RunInfo) -> None:
        try:
            self._sent.id = self._start(info)
            self._sent.save()
            self._opened.set()
            while self._serve(self._next_jobs()):
                pass
        except Exception as error:
            self._error = error
        except BaseException as error:
            # A client that calls sys.exit would end this thread alone, and nobody would see it.
            self._error = LoopkitError(f"{self.name} gave up: {error!r}")
        finally:
            self._opened.set()

    def _send_other(self, name: str, value: Any, step: int) -> None:
        """Send an array or media. What the service does not take costs no other value."""
        try:
            problem = ""
            if isinstance(value, Media):
                self._send_media(value, step)
            elif not self._send_array(name, value, step):
                problem = f"takes no array of shape {value.shape}"
        except (ImportError, ValueError, TypeError) as error:
            problem = f"did not take it: {error}"
        if problem and name not in self._reported:
            self._reported.add(name)
            warnings.warn(
                f"{self.name} {problem}. {name!r} is not logged there", LoopkitWarning, stacklevel=2
            )

    def _next_jobs(self) -> list[tuple[str, Any, int]]:
        """Return all jobs that wait, at least one."""
        jobs = [self._jobs.get()]
        try:
            while True:
                jobs.append(self._jobs.get_nowait())
        except Empty:
            return jobs

    def _serve(self, jobs: list[tuple[str, Any, int]]) -> bool:
        """Do the jobs, rows in one batch. Return False after the last one."""
        rows: list[Row] = []
        for kind, content, step in jobs:
            if kind == "row":
                new = self._sent.take(content, step)
                if new:
                    rows.append((new, step))
                continue
            if rows:
                self._send(rows)
                rows = []
            if kind == "stop":
                self._sent.save()
                self._stop(content)
                return False
            for name, value in self._sent.take(content, step).items():
                self._send_other(name, value, step)
        if rows:
            self._send(rows)
        self._sent.save()
        return True


@contextmanager
def wav_file(media: Media) -> Iterator[str]:
    """Inside, a temporary file holds converted audio. Gives its path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audio.wav"
        path.write_bytes(wav(media))
        yield str(path)


def to_media(api: Any, array: Any) -> Any:
    """Return a vector as the service's Histogram, or a matrix as its Table.

    Returns:
        None for another array, and for a matrix of more than 10,000 cells.
    """
    if array.ndim == 1 and np.isfinite(array).any():
        return api.Histogram(array[np.isfinite(array)])
    if array.ndim == 2 and array.size <= _MOST_CELLS:
        return api.Table(
            columns=[str(column) for column in range(array.shape[1])], data=array.tolist()
        )
    return None


class _SentValues:
    """A file with a service's id of a run and the last step that was sent for each value."""

    def __init__(self, path: Path, step: int) -> None:
        known = json.loads(path.read_text(encoding="utf-8")) if step and path.exists() else {}
        self._path = path
        self.id: str | None = known.get("id")
        self._before: dict[str, int] = known.get("last", {})
        self._last = dict(self._before)

    def take(self, values: Mapping[str, Any], step: int) -> dict[str, Any]:
        """Return the values that no earlier attempt has sent, and note them as sent."""
        new = {name: value for name, value in values.items() if step > self._before.get(name, -1)}
        self._last |= dict.fromkeys(new, step)
        return new

    def save(self) -> None:
        text = json.dumps({"id": self.id, "last": self._last}) + "\n"
        write_file(self._path, [text.encode("utf-8")], durable=True)


def _default_name(run_dir: Path) -> str:
    """Return the directory's name; of a numbered one (runs/digits/3) the parent's name too."""
    path = run_dir.absolute()
    return f"{path.parent.name}-{path.name}" if path.name.isdigit() else path.name
