"""The replay of a power loss: after any prefix of a run's file operations, what is left must do."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopkit.checkpoint import Store, clean, load_newest
from loopkit.errors import LoopkitError
from loopkit.events import Hook
from loopkit.loggers.jsonl import read_rows
from loopkit.run import Run
from loopkit.testing.disk import Disk, Operation
from loopkit.testing.forks import MEMORY
from loopkit.testing.recording import Recorder
from loopkit.testing.trace import require

PROMISE = "promise"
"""The kind of an entry in a log of operations that says: from now on this save must be found."""


class Promises(Hook):
    """Notes in a recorded run which saves are promised: those that ``on_save`` named."""

    may_request = False

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def on_save(self, run: Run, path: Path) -> None:
        """Note the save."""
        if run.strategy.rank == 0:
            self._recorder.note(PROMISE, path)


@dataclass(frozen=True)
class Crashed:
    """One state of the disk after a power loss.

    Attributes:
        number: how many operations the disk was asked for before.
        path: the directory that holds what is left, in place of the recorded root.
        promised: the step of the newest save that was promised; 0 before the first.
    """

    number: int
    path: Path
    promised: int


def crashes(
    operations: Sequence[Operation],
    root: Path,
    count: int,
    seed: int,
    *,
    ignore: Collection[str] = (),
) -> Iterator[Crashed]:
    """Yield ``count`` states of the disk after a power loss, spread over all the moments of a run.

    Each directory is deleted when the next one is asked for.

    Args:
        operations: the recorded operations.
        root: the directory that was recorded.
        count: the number of states.
        seed: of the choices that a file system has.
        ignore: kinds of operations that this disk forgets, to test the check itself.
    """
    chosen, promised = random.Random(seed), 0
    moments = len(operations) + 1
    disk = Disk(root, ignore)
    for number in range(moments):
        for _ in range((number + 1) * count // moments - number * count // moments):
            with tempfile.TemporaryDirectory(dir=MEMORY, prefix="loopkit-crash-") as name:
                disk.crash(chosen, Path(name))
                yield Crashed(number, Path(name), promised)
        if number < len(operations):
            kind, path, _ = operations[number]
            if kind == PROMISE:
                promised = int(path.name.split("-")[1])
            disk.do(operations[number])


def check_what_is_left(
    crashed: Crashed, run_dir: Path, rows: Sequence[dict[str, Any]], finds: Callable[..., Any]
) -> int:
    """Check a run directory after a power loss, and return the step that a resume starts from.

    The newest promised save, or a later one, is there and whole. The log has each row up to it.

    Args:
        crashed: the state.
        run_dir: relative to the recorded root.
        rows: of the whole run.
        finds: gets the snapshot that was found.

    Raises:
        AssertionError: something is lost.
    """
    found_dir, told = crashed.path / run_dir, []  # type: ignore[var-annotated]
    where = f"after operation {crashed.number}"
    try:
        clean(Store(), found_dir)
        found = load_newest(Store(), found_dir, warn=told.append)
    except LoopkitError as error:
        raise AssertionError(f"{where}: {error}") from error
    step: int = found[1].meta["step"] if found else 0
    require(
        step >= crashed.promised,
        f"{where}: the save of step {crashed.promised} was promised, and the newest is of {step}",
    )
    require(not told, f"{where}: {told}")
    if found:
        finds(found[1])
        log = found_dir / "metrics.jsonl"
        kept = [row for row in (read_rows(log) if log.exists() else []) if row["step"] <= step]
        wanted = [row for row in rows if row["step"] <= step]
        require(
            kept == wanted,
            f"{where}: the checkpoint of step {step} has passed {len(wanted)} rows of the log, and "
            f"{len(kept)} are there",
        )
    return step
