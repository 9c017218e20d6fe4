"""What a run whose ``run_dir`` or ``resume`` is a URL does with the store, besides training."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from loopkit.run import Run
from loopkit.storage import (
    AUTO,
    FETCHED,
    Kept,
    RunStorage,
    as_url,
    fetch_checkpoint,
    remove_fetched,
)

_ONE_WAIT = 2.0  # seconds


def open_storage(run: Run, local: Path, resources: ExitStack) -> RunStorage | None:
    """Take the place that ``run_dir`` names, if it is a URL; fetch what the run continues from.

    Called on rank 0.

    Args:
        run: the run.
        local: the local copy, whose lock is held.
        resources: its end finishes the upload.

    Returns:
        What brings the run to the store; None where ``run_dir`` is a path.

    Raises:
        LoopkitError: as ``RunStorage.open``.
    """
    url = run.options.url
    resources.callback(remove_fetched, local)
    if url is None:
        return None
    settings = run.options.saves()
    kept = Kept()
    if settings is not None:
        kept = Kept(settings.keep, settings.keep_best, settings.monitor())
    storage = RunStorage(url, local, kept=kept, say=run.screen.say)

    def close(
        kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A second Ctrl-C, in the middle of a step, leaves at once.
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            storage.leave()
        else:
            interrupted = run.outcome.status == "interrupted"
            storage.close(raises=kind is None and not interrupted)

    resources.push(close)
    storage.open(_own(url, run.options.resume))
    return storage


def _own(run_url: str, resume: str | Path | None) -> str | None:
    """Return what to fetch: ``AUTO``, or the name of a checkpoint of this run; None for nothing."""
    if resume in (None, AUTO):
        return AUTO if resume else None
    url = as_url(resume)
    if url is None:
        return None
    return AUTO if url == run_url else RunStorage.name_of(run_url, url)


def wait_for_upload(run: Run) -> None:
    """Wait on all ranks until rank 0 has uploaded what was saved.

    A launcher that sees the other ranks end would soon end rank 0. The waits are short, so that no
    collective comes to its time limit.
    """
    world = run.strategy.world
    if run.options.url is None or run.checkpointer is None or world.size == 1:
        return
    storage = run.checkpointer.storage
    run.screen.doing(f"uploading to {run.options.url} …")
    while not world.broadcast_object(storage is None or storage.drain(_ONE_WAIT)):
        pass
    run.screen.doing("")


def resume_path(resume: str | Path, run_dir: Path, storage: RunStorage | None) -> Path:
    """Return the local path of what ``resume`` names. A checkpoint of another run is fetched.

    Called on rank 0. All ranks see the path.

    Raises:
        CheckpointError: there is no such checkpoint, or it is corrupt.
        StorageError: the store does not answer.
    """
    url = as_url(resume)
    if url is None:
        return Path(resume)
    own = None if storage is None else storage.path_of(url)
    if own is not None:
        return own
    folder = run_dir / FETCHED
    folder.mkdir(exist_ok=True)
    return fetch_checkpoint(url, folder, kind="full", option="resume=")[0]
