"""Checkpointer: when a run is saved, by which rank, what is kept, and where it resumes from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from loopkit.checkpoint import (
    BackgroundWriter,
    NodeDisks,
    Snapshot,
    Store,
    apply_retention,
    checkpoints_dir,
    clean,
    complete_on_nodes,
    detach_after,
    find_on_nodes,
    load_checkpoint,
    load_newest,
    load_snapshot,
    scan,
    write_checkpoint,
    write_on_nodes,
    write_sharded,
)
from loopkit.distributed.communicator import Communicator
from loopkit.distributed.environment import find_rank_info
from loopkit.errors import CheckpointError, LoopkitError, OptionError, RunDirError
from loopkit.fit.remote_run import resume_path
from loopkit.fit.state import check_saveable, load_run_state, run_state
from loopkit.options import Checkpoint, Options
from loopkit.run import Run
from loopkit.storage import RunStorage

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Checkpointer:
    """Save the state of a run, at once or in the background, and delete old checkpoints.

    Every rank calls each method. Rank 0 writes, or under ``sharded`` every rank its own shards. With
    ``disks`` each machine keeps what it needs on its own. An error of one rank is raised on all of
    them.

    Args:
        settings: what is saved, and which checkpoints are kept.
        run_dir: the directory of the run.
        store: does the file operations.
        world: all ranks.
        sharded: whether every rank writes its own shards.
        storage: brings what is saved to a store; on rank 0 of a run in one.

    Attributes:
        newest: the newest checkpoint of this run; None before the first.
    """

    def __init__(
        self,
        settings: Checkpoint,
        run_dir: Path,
        store: Store,
        world: Communicator,
        *,
        sharded: bool = False,
        storage: RunStorage | None = None,
        disks: NodeDisks | None = None,
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir
        self.store = store
        self.newest: Path | None = None
        self.storage = storage
        self._trusted: set[Path] = set()
        self._saved_step = -1
        self._in_flight: int | None = None  # the step of a background save that is not reported
        self._world = world
        # Background writers exchange messages while training does: in a group of their own.
        self._writers = world.new_group() if sharded or disks else None
        self._sharded, self._disks = sharded, disks
        if disks is not None and self._writers is not None:
            self._disks = replace(disks, communicator=self._writers)
        self._background = BackgroundWriter(
            store, run_dir, self._retain, self._writers, self._disks
        )
        _on_writers(world, disks, lambda: clean(store, run_dir))

    def save(self, run: Run, *, again: bool = False) -> None:
        """Save the state of this moment, unless it is saved already.

        Args:
            run: the run.
            again: save also a step that is saved, as its next generation.

        Raises:
            DiskFullError: this save, or an earlier one in the background, did not fit. Earlier
                checkpoints are intact.
        """
        saved = self._saved_step == run.progress.step and not run.triggers.is_requested("eval")
        if saved and not again:
            return
        run.screen.doing(f"saving the state of step {run.progress.step:,} …")
        if self.settings.background:
            # Retention of the next save may delete the last one: listeners get it before.
            self._report(run, self._on_writing_ranks(self._background.wait))
        snapshot = run_state(run, weights_only=self.settings.weights_only)
        if self._disks is not None and not self._sharded and self._world.rank != 0:
            snapshot = replace(snapshot, tensors={})  # those of rank 0 are sent
        self._report(run, self._on_writing_ranks(lambda: self._write(snapshot)))
        self._saved_step = run.progress.step
        self._in_flight = self._saved_step if self.settings.background else None
        run.screen.doing("")

    def poll(self, run: Run) -> None:
        """Emit ``on_save`` for each background save that is finished; raise the error of one."""
        if self._writers is not None and any(self._world.all_gather_object(self._background.busy)):
            return  # a save is finished when all ranks have written their shards
        self._report(run, self._on_writing_ranks(self._background.poll))

    def next_poll(self, step: int) -> int | None:
        """Return the step to poll after, as seen from ``step``; None if no save is in flight.

        Each distance from the save is twice the last one, so a slow save costs few polls. All ranks
        get the same step.
        """
        if self._in_flight is None:
            return None
        return step + max(1, step - self._in_flight)

    def finish(self, run: Run) -> None:
        """Wait for the background save."""
        if self._in_flight is not None:
            run.screen.doing(f"waiting for the save of step {self._in_flight:,} …")
        self._report(run, self._on_writing_ranks(self._background.close))
        run.screen.doing("")

    def close(self) -> None:
        """Destroy the process group of the background writers, however the run ended."""
        if self._writers is not None:
            self._writers.destroy()

    def best(self, run: Run) -> Path | None:
        """Return the checkpoint of the best evaluation; None without one."""
        entries = self._world.run_on_rank_zero(lambda: scan(self.store, self.run_dir))
        step = run.record.best.get("step")
        found = [entry.path for entry in entries if entry.step == step and not entry.problem]
        if found and self._disks is not None and self.settings.load_best:
            complete_on_nodes(self.store, found[-1], replace(self._disks, communicator=self._world))
        return found[-1] if found else None

    def resumed(self, path: Path, step: int) -> None:
        """Note that the run continues from ``path``, which is known to be valid."""
        self._trusted.add(path)
        self.newest, self._saved_step = path, step

    def _on_writing_ranks(self, function: Callable[[], list[Path]]) -> list[Path]:
        """Call ``function`` on the ranks that write; return rank 0's result on all ranks."""
        if self._writers is None:
            return self._world.run_on_rank_zero(function)
        return self._world.run_on_all_ranks(function)

    def _write(self, snapshot: Snapshot) -> list[Path]:
        if self.settings.background:
            self._background.submit(snapshot)
            return []
        writes = self._world.rank == 0
        if self._disks is not None:
            path = write_on_nodes(self.store, self.run_dir, snapshot, self._disks)
            writes = self._disks.leads
        elif self._writers is None:
            path = write_checkpoint(self.store, self.run_dir, snapshot)
        else:
            path = write_sharded(self.store, self.run_dir, snapshot, self._writers)
        if writes:
            self._retain(path)
        return [path]

    def _report(self, run: Run, paths: list[Path]) -> None:
        for path in paths:
            self.newest, self._in_flight = path, None
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
        if self.storage is not None:
            self.storage.saved()


def open_checkpointer(run: Run, storage: RunStorage | None = None) -> None:
    """Open the checkpoints of a run, and resume from the one that ``resume`` names.

    Args:
        run: the run, whose directory is open.
        storage: on rank 0 of a run in a store.

    Raises:
        RunDirError: the directory holds checkpoints, and ``resume`` does not say what to do.
        CheckpointError: the named checkpoint is missing, does not fit, or cannot be read by every
            rank.
    """
    options, world, disks = run.options, run.strategy.world, node_disks(run)
    store, run_dir = Store(maps=run.strategy.sharded, partial=disks is not None), run.run_dir
    assert run_dir is not None
    _on_writers(world, disks, lambda: _check_unused(options, store, run_dir))
    settings = options.saves()
    if settings is not None:
        check_saveable(run)
        run.checkpointer = Checkpointer(
            settings,
            run_dir,
            store,
            world,
            sharded=run.strategy.sharded,
            storage=storage,
            disks=disks,
        )
    resume = options.resume
    if disks is not None and resume == "auto":
        resume = find_on_nodes(store, run_dir, disks)
    elif disks is not None and resume is not None:
        complete_on_nodes(store, Path(resume), disks)
    found = _find_on_all_ranks(run, store, run_dir, resume, storage)
    if found is None:
        return
    path, snapshot = found
    load_run_state(run, snapshot, path)
    run.record.resumed_from = path
    logger.info("resumed from %s at step %d", path, run.progress.step)
    if path.resolve().parent == checkpoints_dir(run_dir).resolve():
        # Later checkpoints do not belong to this run any more; one would be the newest next time.
        _on_writers(world, disks, lambda: _detach_after(store, run_dir, path, storage))
        if run.checkpointer is not None:
            run.checkpointer.resumed(path, run.progress.step)


def node_disks(run: Run) -> NodeDisks | None:
    """Return how the machines share their run directories out; None if they share one.

    Raises:
        OptionError: the run is kept in a store, which all machines share.
    """
    settings, info = run.options.saves(), find_rank_info()
    if settings is None or not settings.save_on_each_node:
        return None
    if run.options.url is not None:
        raise OptionError(
            f"save_on_each_node with run_dir={run.options.url!r}: all machines share the store. "
            "Leave save_on_each_node out, or give a directory"
        )
    return NodeDisks(run.strategy.world, leads=info is None or info.local_rank == 0)


def _on_writers(world: Communicator, disks: NodeDisks | None, function: Callable[[], T]) -> T:
    """Call ``function`` on rank 0, or on one rank of each machine that has its own run directory."""
    return world.run_on_rank_zero(function) if disks is None else disks.on_each(function)


def _check_unused(options: Options, store: Store, run_dir: Path) -> None:
    present = scan(store, run_dir)
    if present and options.resume is None:
        raise RunDirError(
            f"{options.url or run_dir} holds {len(present)} checkpoint(s), up to "
            f"{present[-1].path.name}: pass resume='auto' to continue from the newest, or another run_dir"
        )


def _detach_after(store: Store, run_dir: Path, path: Path, storage: RunStorage | None) -> None:
    detached = detach_after(store, run_dir, path)
    if storage is not None:
        storage.continues_from(path)
    if detached:
        logger.warning(
            "the run continues from %s, so the later checkpoints are set aside, whole: %s. Resume "
            "from the path of one to return to it",
            path.name,
            ", ".join(each.name for each in detached),
        )


def _find_on_all_ranks(
    run: Run,
    store: Store,
    run_dir: Path,
    resume: str | Path | None,
    storage: RunStorage | None,
) -> tuple[Path, Snapshot] | None:
    """Return the checkpoint that rank 0 finds, as each rank reads it from its own file system."""
    world = run.strategy.world
    local: list[tuple[Path, Snapshot]] = []

    def find() -> Path | None:
        found = _find(resume, run_dir, store, storage)
        if found is None:
            return None
        local.append(found)
        return found[0]

    path = world.run_on_rank_zero(find)
    if path is None:
        return None
    problem = ""
    if not local:
        try:
            local.append((path, load_snapshot(path, store)))
        except (LoopkitError, OSError) as error:
            problem = str(error)
    for rank, found in enumerate(world.all_gather_object(problem)):
        if found:
            raise CheckpointError(
                f"{path}, which rank 0 resumes from, cannot be read by rank {rank}: {found}. All "
                "ranks must see one run directory"
            )
    return local[0]


def _find(
    resume: str | Path | None, run_dir: Path, store: Store, storage: RunStorage | None
) -> tuple[Path, Snapshot] | None:
    """Return the checkpoint that ``resume`` names, and what it holds."""
    if resume is None:
        return None
    if resume == "auto":
        found = load_newest(store, run_dir, kind="full")
        if found is None and scan(store, run_dir):
            raise CheckpointError(
                f"{run_dir} holds weights alone, which cannot be resumed: load them into the task, "
                "and train on in another run_dir"
            )
        return found
    path = resume_path(resume, run_dir, storage)
    return load_checkpoint(path, store, kind="full", option="resume=")
