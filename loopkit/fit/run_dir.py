"""The directory of a run: which one a start takes, and what is removed if the start fails."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

from loopkit.checkpoint import LOCK, has_checkpoints
from loopkit.errors import RunDirError
from loopkit.options import Options
from loopkit.storage import RunStorage, local_copy_of, remove_fetched
from loopkit.task import Task, name_of


class RunDirectory:
    """The directory that a start takes. Until ``keep``, all that the start made can be removed.

    Attributes:
        path: the directory, which exists.
        storage: brings the directory to a store; None for a run that is in none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.storage: RunStorage | None = None
        self._kept = False
        missing = [each for each in (path, *path.parents) if not each.exists()]
        self._made: list[Path] = []  # the innermost first
        for each in reversed(missing):
            each.mkdir(exist_ok=each != path)
            self._made.insert(0, each)
        path.mkdir(exist_ok=True)  # an error if the path is a file
        names = {each.name for each in path.iterdir()}
        self._had_lock, self._was_empty = LOCK in names, names <= {LOCK}

    def keep(self) -> None:
        """Leave everything in place: the run has started. Bring it to the store from now on."""
        self._kept = True
        remove_fetched(self.path)
        if self.storage is not None:
            self.storage.start()

    def remove_content(self) -> None:
        """Remove what a failed start wrote. A directory that held files before stays as it is."""
        if self._kept or not self._was_empty:
            return
        for each in self.path.iterdir():
            if each.name == LOCK:
                continue
            if each.is_dir() and not each.is_symlink():
                shutil.rmtree(each, ignore_errors=True)
            else:
                with suppress(OSError):
                    each.unlink()

    def remove(self) -> None:
        """Remove the directories that a failed start made, as far as they are empty."""
        if self._kept:
            return
        with suppress(OSError):
            if not self._had_lock:
                (self.path / LOCK).unlink()
        with suppress(OSError):
            for each in self._made:
                each.rmdir()


def choose_run_dir(options: Options, task: Task) -> RunDirectory:
    """Create the directory of this run if it is not there, and return it.

    It is ``run_dir``, or the local copy of a URL, or else the next ``runs/<task>/<n>``.
    ``resume="auto"`` takes the newest ``runs/<task>/<n>`` that holds a checkpoint, and else the next
    one.

    Raises:
        RunDirError: the directory cannot be created.
    """
    try:
        if options.run_dir is not None:
            place = local_copy_of(options.url) if options.url else Path(options.run_dir)
            return RunDirectory(place)
        parent = Path("runs") / name_of(task).lower()
        numbers = []
        if parent.is_dir():
            numbers = sorted(int(p.name) for p in parent.iterdir() if p.name.isdigit())
        if options.resume == "auto":
            for number in reversed(numbers):
                if has_checkpoints(parent / str(number)):
                    return RunDirectory(parent / str(number))
        number = numbers[-1] + 1 if numbers else 1
        while True:
            try:
                return RunDirectory(parent / str(number))
            except FileExistsError:  # another start has made it meanwhile
                number += 1
    except OSError as error:
        raise RunDirError(
            f"the run directory {error.filename} cannot be made: {error.strerror}. "
            "Give another with run_dir="
        ) from error
