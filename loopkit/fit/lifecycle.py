"""The life of a run: open, start, finish and close it, whatever happens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType

from loopkit.checkpoint import RunLock, Store, load_snapshot, sync_logs
from loopkit.console import build_progress
from loopkit.cpu_memory import freed_memory_kept
from loopkit.errors import LoopkitError, OptionError
from loopkit.events import Subscription
from loopkit.files import sync_entry
from loopkit.fit.agreement import check_node_dirs, check_run_dir
from loopkit.fit.checkpointer import node_disks, open_checkpointer
from loopkit.fit.remote_run import open_storage, wait_for_upload
from loopkit.fit.run_dir import RunDirectory, choose_run_dir
from loopkit.fit.run_keeper import RunKeeper
from loopkit.fit.setup import (
    new_run,
    open_strategy,
    prepare_training,
    torch_settings,
    warn_of_batch_norm,
)
from loopkit.fit.signals import signals
from loopkit.fit.state import prepare_model_load
from loopkit.fit.task_checks import explain
from loopkit.hooks.numerics import Numerics
from loopkit.loggers.base import Loggers
from loopkit.loggers.registry import build_loggers
from loopkit.loops.epoch import evaluate, evaluate_again, row_of_its_own
from loopkit.loops.monitors import warn_of_no_best, warn_of_unlogged
from loopkit.optim.groups import no_gradient_outside
from loopkit.optim.schedule_free import schedule_free_optimizers
from loopkit.options import Options
from loopkit.run import Run
from loopkit.storage import fetched
from loopkit.task import Task, name_of
from loopkit.task_changes import fixed_parameters

logger = logging.getLogger(__name__)
_RUNNING = threading.RLock()


@contextmanager
def training(task: Task, options: Options, subscriptions: list[Subscription]) -> Iterator[Run]:
    """Inside, a run is ready to train: built, locked and resumed.

    Whatever happens, ``on_error`` gets an exception, and everything that was opened is
    closed. That includes an exception of the set-up itself.
    """
    console = build_progress(options.progress)
    hooks = [Numerics()] if options.debug == "numerics" else []
    keeper = RunKeeper()
    listeners = [*hooks, *subscriptions, *([console] if console else [])]
    run = new_run(task, options, listeners, observers=[keeper])
    run.screen = console or run.screen
    with only_in_this_thread(), ExitStack() as resources, errors_reported(run):
        locks = resources.enter_context(ExitStack())  # released last
        resources.push(lambda kind, error, trace: keeper.close(run, error))
        resources.enter_context(keeper.keeping_warnings())
        close_with(resources, run)
        prepare_training(run)
        resources.enter_context(no_gradient_outside(run.task, list(run.optimizers.values())))
        resources.enter_context(fixed_parameters(run.task, name_of(run.task)))
        directory = _open_run_dir(run, locks)
        open_checkpointer(run, None if directory is None else directory.storage)
        keeper.open(run)  # before the loggers, whose files say when a killed attempt ended
        _open_loggers(run)
        with signals(run), torch_settings(options), freed_memory_kept(run.strategy.device):
            start(run)
            if directory is not None:
                directory.keep()
            yield run


@contextmanager
def inference(
    task: Task, options: Options, subscriptions: list[Subscription], checkpoint: str | Path | None
) -> Iterator[Run]:
    """Inside, a run is ready to evaluate or predict, with the weights of ``checkpoint`` if given.

    Errors are reported, and everything is closed, as in ``training``.
    """
    run = new_run(task, options, subscriptions)
    with only_in_this_thread(), ExitStack() as resources, errors_reported(run):
        close_with(resources, run)
        open_strategy(run)
        with torch_settings(options), freed_memory_kept(run.strategy.device):
            if checkpoint is not None:
                with fetched(checkpoint) as path:
                    _load_weights(run, path)
            if run.events.setup is not None:
                run.events.setup(run)
            yield run


@contextmanager
def only_in_this_thread() -> Iterator[None]:
    """Inside, no other thread of this process can run a Fit; this one can, as in a hook.

    Raises:
        OptionError: another thread runs one.
    """
    if not _RUNNING.acquire(blocking=False):
        raise OptionError(
            "another thread of this process runs a Fit. torch's random generators and settings belong "
            "to the process, so two at once would change each other's numbers: run them one after "
            "another, or each in a process of its own"
        )
    try:
        yield
    finally:
        _RUNNING.release()


@contextmanager
def errors_reported(run: Run) -> Iterator[None]:
    """Inside, an exception is given to ``on_error`` before it leaves."""
    try:
        yield
    except BaseException as error:
        logger.info("the run ends by %s at step %d", type(error).__name__, run.progress.step)
        explain(error, run)
        if run.events.error is not None:
            run.events.error(run, error)
        raise


def start(run: Run) -> None:
    """Emit the first events, start the clock, and do the evaluation that is due before step 1."""
    events = run.events
    if events.setup is not None:
        events.setup(run)
    warn_of_batch_norm(run)
    if run.record.resumed_from is not None and events.load is not None:
        events.load(run, run.record.resumed_from)
    if events.fit_start is not None:
        events.fit_start(run)
    run.at_start.watch_attributes(run.task)
    run.stopwatch.start()
    first = run.options.eval_first and run.progress.step == 0
    if run.eval_data and run.triggers.pop("eval"):
        evaluate_again(run)
    elif run.eval_data and first:
        evaluate(run)


def finish(run: Run) -> None:
    """Wait for the last checkpoint, load the best weights if wanted, and emit ``on_fit_end``."""
    run.progress.seconds += run.stopwatch.lap()
    checkpointer = run.checkpointer
    if checkpointer is not None:
        checkpointer.finish(run)
    for optimizer in schedule_free_optimizers(run.optimizers.values()):
        optimizer.eval()
    if checkpointer is not None:
        warn_of_unlogged(run)
        warn_of_no_best(run)
        best = checkpointer.best(run)
        if run.record.best:
            run.record.best["checkpoint"] = best
        if checkpointer.settings.load_best and best is not None:
            snapshot = load_snapshot(best, checkpointer.store)
            prepare_model_load(run, snapshot, best)()
            logger.info("loaded the best weights, of %s", best)
    with row_of_its_own(run, decides=False):
        if run.events.fit_end is not None:
            run.events.fit_end(run)
    wait_for_upload(run)
    logger.info("%s at step %d %s", run.outcome.status, run.progress.step, run.outcome.reason)


def close_with(resources: ExitStack, run: Run) -> None:
    """Have ``resources`` close the parts of ``run`` in reverse order, those that are open then."""

    def teardown(
        kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run.strategy.teardown(failed=kind is not None)

    def close_data() -> None:
        if run.loader is not None:
            run.loader.source.close()
        for source in run.eval_data.values():
            source.close()

    def close_checkpointer() -> None:
        if run.checkpointer is not None:
            run.checkpointer.close()

    def close_loggers(
        kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        logs = run.loggers.files()
        run.loggers.close("failed" if kind is not None else run.outcome.status)
        if run.run_dir is not None and logs:
            with suppress(LoopkitError):  # the directory is gone: the error of the run says so
                sync_logs(Store(), run.run_dir, logs)

    resources.push(teardown)
    resources.callback(close_checkpointer)
    resources.callback(close_data)
    resources.push(close_loggers)


def _open_run_dir(run: Run, locks: ExitStack) -> RunDirectory | None:
    """Create the directory of the run on rank 0, lock it and return it; None on other ranks.

    Where machines have disks of their own, one rank of each does. Until the directory is kept, the
    end of ``locks`` removes what this start has made.
    """
    made: list[RunDirectory] = []
    disks = node_disks(run)

    def open_here() -> Path:
        directory = choose_run_dir(run.options, run.task)
        locks.callback(directory.remove)
        held = RunLock(directory.path, str(directory.path))
        locks.callback(held.release)
        locks.callback(directory.remove_content)
        directory.storage = open_storage(run, directory.path, locks)
        made.append(directory)
        sync_entry(directory.path)
        return directory.path

    if disks is None:
        run_dir = run.strategy.world.run_on_rank_zero(open_here)
        check_run_dir(run, run_dir)
    else:
        run_dir = disks.on_each(lambda: Path(run.options.run_dir or ""))
        check_node_dirs(disks, run_dir)
        disks.on_each(open_here)
    run.run_dir = run_dir
    return made[0] if made else None


def _open_loggers(run: Run) -> None:
    """Open the loggers on rank 0, and take the rows of earlier attempts from them."""
    assert run.run_dir is not None
    about = {
        "task": name_of(run.task),
        "hparams": dict(run.task.hparams),
        "options": run.options.to_dict(),
    }
    silent = run.strategy.rank != 0
    run.loggers = Loggers(() if silent else build_loggers(run.options.loggers), silent=silent)
    run.loggers.open(run.run_dir, run.progress.step, about)
    for each in run.loggers:
        run.record.history = list(getattr(each, "rows", [])) or run.record.history
    run.record.history = run.strategy.world.broadcast_object(run.record.history)


def _load_weights(run: Run, checkpoint: Path) -> None:
    snapshot = load_snapshot(checkpoint, Store(maps=run.strategy.sharded))
    prepare_model_load(run, snapshot, checkpoint)()
