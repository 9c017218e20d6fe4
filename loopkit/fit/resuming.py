"""Resuming: where a run goes on from, decided once for all ranks."""

from __future__ import annotations

from pathlib import Path

from loopkit.checkpoint import (
    Snapshot,
    Store,
    checkpoints_dir,
    detach_after,
    load_newest,
    load_snapshot,
    scan,
)
from loopkit.errors import CheckpointError, LoopkitError, NoGoodCheckpointError, RunDirError
from loopkit.fit.checkpointer import Checkpointer
from loopkit.fit.state import load_run_state
from loopkit.run import Run


def open_checkpointer(run: Run) -> None:
    """Open the run's checkpoints, and go on from the one that ``resume`` names.

    Raises:
        RunDirError: the directory holds checkpoints and nothing says whether to go on from them.
        CheckpointError: the named one is not there, does not fit, or is not there for every rank.
    """
    options, store, world = run.options, Store(maps=run.strategy.sharded), run.strategy.world
    run_dir = run.run_dir
    assert run_dir is not None
    there = world.run_on_rank_zero(lambda: scan(store, run_dir))
    if there and options.resume is None:
        raise RunDirError(
            f"{run_dir} holds {len(there)} checkpoint(s), up to {there[-1].path.name}: pass "
            "resume='auto' to go on from the newest, or another run_dir"
        )
    saves = options.saves()
    if saves is not None:
        run.checkpointer = Checkpointer(
            saves, run_dir, store, world, alone=not run.strategy.sharded
        )
    found = _found_by_all(run, store, run_dir)
    if found is not None:
        path, snapshot = found
        load_run_state(run, snapshot, path)
        run.resumed_from = path
        if path.resolve().parent == checkpoints_dir(run_dir).resolve():
            # or the abandoned later steps would be the newest next time
            world.run_on_rank_zero(lambda: detach_after(store, run_dir, path))
            if run.checkpointer is not None:
                run.checkpointer.resumed(path, run.progress.step)


def _found_by_all(run: Run, store: Store, run_dir: Path) -> tuple[Path, Snapshot] | None:
    """The checkpoint that the first rank finds, as every rank reads it from its own file system."""
    world, mine = run.strategy.world, []

    def find() -> Path | None:
        found = _find(run.options.resume, run_dir, store)
        mine.append(found)
        return None if found is None else found[0]

    path = world.run_on_rank_zero(find)
    if path is None:
        return None
    problem = ""
    if not mine:
        try:
            mine.append((path, load_snapshot(path, store)))
        except (LoopkitError, OSError) as error:
            problem = str(error)
    for rank, trouble in enumerate(world.all_gather_object(problem)):
        if trouble:
            raise CheckpointError(
                f"{path}, which the first rank goes on from, cannot be read by rank {rank}: "
                f"{trouble}. All ranks must see one run directory"
            )
    return mine[0]


def _find(resume: str | Path | None, run_dir: Path, store: Store) -> tuple[Path, Snapshot] | None:
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
    path = Path(resume)
    if not path.exists():
        raise CheckpointError(
            f"resume={str(resume)!r}: there is no such checkpoint or run directory"
        )
    if (path / "checkpoints").is_dir():
        found = load_newest(store, path, kind="full", quarantine=False)  # it may be another run's
        if found is None:
            raise NoGoodCheckpointError(
                f"resume={str(resume)!r}: the run directory holds no checkpoint"
            )
        return found
    return path, load_snapshot(path, store)
