"""Saver: when a run's state is saved, by whom, and what is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loopkit.checkpoint import (
    BackgroundWriter,
    Snapshot,
    Store,
    apply_retention,
    clean,
    scan,
    write,
    write_together,
)
from loopkit.distributed.communicator import Communicator
from loopkit.fit.state import run_state
from loopkit.options import Checkpoint
from loopkit.run import Run


class Checkpointer:
    """Saves a run's state where it is asked to, in the background or at once, and keeps what is to
    be kept.

    All ranks call its methods; the first one writes, and what it meets, all of them raise. With
    ``alone=False`` every rank writes its parts, and what any meets, all raise.
    """

    def __init__(
        self,
        settings: Checkpoint,
        run_dir: Path,
        store: Store,
        world: Communicator,
        *,
        alone: bool = True,
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir
        self.store = store
        self.newest: Path | None = None
        self._trusted: set[Path] = set()
        self._saved_step = -1
        self._world = world
        # Writers on several ranks talk to each other while training does: in a group of their own.
        self._together = None if alone else world.new_group()
        self._writer = BackgroundWriter(store, run_dir, self._retain, self._together)
        world.run_on_rank_zero(lambda: clean(store, run_dir))

    def save(self, run: Run) -> None:
        """Save the state of this moment, unless it is saved already.

        Raises:
            DiskFullError: an earlier save or this one did not fit; what was saved before is intact.
        """
        if self._saved_step == run.progress.step and not run.triggers.is_requested("eval"):
            return
        snapshot = run_state(run, weights_only=self.settings.weights_only)
        self._report(run, self._joint(lambda: self._write(snapshot)))
        self._saved_step = run.progress.step

    def _joint(self, function: Callable[[], list[Path]]) -> list[Path]:
        """What ``function`` gives on the first rank, called there or, where all write, everywhere."""
        return (
            self._world.run_on_rank_zero(function)
            if self._together is None
            else self._world.run_on_all_ranks(function)
        )

    def _write(self, snapshot: Snapshot) -> list[Path]:
        if self.settings.background:
            self._writer.submit(snapshot)
            return []
        if self._together is not None:
            path = write_together(self.store, self.run_dir, snapshot, self._together)
        else:
            path = write(self.store, self.run_dir, snapshot)
        if self._world.rank == 0:
            self._retain(path)
        return [path]

    def poll(self, run: Run) -> None:
        """Tell the hooks what a background save has finished; raises its failure."""
        if self._together is not None and any(self._world.all_gather_object(self._writer.busy)):
            return  # what some rank is still writing is finished on none
        self._report(run, self._joint(self._writer.poll))

    def finish(self, run: Run) -> None:
        """Wait for the save in flight."""
        self._report(run, self._joint(self._writer.close))

    def close(self) -> None:
        """The run is over, in whatever way: leave the other writers."""
        if self._together is not None:
            self._together.destroy()

    def best(self, run: Run) -> Path | None:
        """The checkpoint of the best evaluation; None when there was none, or it is gone."""
        entries = self._world.run_on_rank_zero(lambda: scan(self.store, self.run_dir))
        steps = [e.path for e in entries if e.step == run.best.get("step") and not e.problem]
        return steps[-1] if steps else None

    def resumed(self, path: Path, step: int) -> None:
        """The run goes on from ``path``, which is known to be good."""
        self._trusted.add(path)
        self.newest, self._saved_step = path, step

    def _report(self, run: Run, paths: list[Path]) -> None:
        for path in paths:
            self.newest = path
            if run.events.save is not None:
                run.events.save(run, path)

    def _retain(self, path: Path) -> None:
        self._trusted.add(path)
        settings = self.settings
        apply_retention(
            self.store,
            self.run_dir,
            settings.keep,
            settings.keep_best,
            settings.monitor(),
            self._trusted,
        )
