"""Fit: options turned into a run, and the run into a result."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from loopkit.checkpoint import RunLock, Store, load_snapshot
from loopkit.console import build_progress
from loopkit.data.micro_batches import open_source
from loopkit.durations import Duration
from loopkit.events import Hook, Subscription
from loopkit.fit import setup
from loopkit.fit.notebook import on_ranks
from loopkit.fit.resuming import open_checkpointer
from loopkit.fit.signals import PREEMPTED, signals
from loopkit.fit.state import check_model
from loopkit.fit.strategy_setup import start_ranks
from loopkit.loggers.base import Loggers
from loopkit.loggers.registry import build_loggers
from loopkit.loops.epoch import evaluate as evaluate_within
from loopkit.optim.schedule_free import schedule_free_optimizers
from loopkit.options import Options, check_names
from loopkit.result import Result
from loopkit.run import Run
from loopkit.strategies.dtensor import put_all
from loopkit.task import Task, name_of

P = ParamSpec("P")
T = TypeVar("T")


def _takes(
    source: Callable[P, Any],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give ``Fit.__init__`` the signature of Options, for type checkers and for ``help()``."""

    def wrap(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        wrapped = wraps(source, assigned=("__doc__", "__annotations__"))(init)
        parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
        parameters += inspect.signature(source).parameters.values()
        vars(wrapped)["__signature__"] = inspect.Signature(parameters)
        return wrapped

    return wrap


class Fit:
    """Trains, evaluates and predicts with a Task. See ``loopkit.options.Options`` for every option.

    Raises:
        OptionError: an option that is not known, or a value that is not accepted.
    """

    @_takes(Options)
    def __init__(self, **options: Any) -> None:
        check_names(options)
        self.options = Options(**options)
        self._subscriptions: list[Subscription] = []

    def on(
        self, event: str, function: Callable[..., None] | None = None, *, every: object = None
    ) -> Any:
        """Subscribe a function to an event, also as a decorator: ``@fit.on("step_end", every="100
        steps")``.

        Args:
            event: a name of ``loopkit.Hook``'s events, with or without ``on_``.
            function: gets what the event's method gets; None makes a decorator.
            every: at which occurrences, as for ``eval_every``; None for all.

        Raises:
            OptionError: there is no such event, or ``every`` is not a duration.
        """

        def subscribe(listener: Callable[..., None]) -> Callable[..., None]:
            self._subscriptions.append(Subscription(event, listener, every))
            return listener

        return subscribe if function is None else subscribe(function)

    def run(self, task: Task) -> Result:
        """Train ``task``, from the start or from where ``resume`` says.

        Raises:
            LoopkitError: whatever goes wrong, by kind (``loopkit.errors``); SystemExit(143) after
                SIGTERM.
        """
        if ranks := start_ranks(self.options):
            return on_ranks(ranks, self, "run", task)  # type: ignore[no-any-return]
        if self.options.dry_run:
            return _dry_run(self, task)
        with _training(task, self.options, self._subscriptions) as run:
            epoch = run.loops.epoch
            while not run.finished():
                epoch.run(run)
            _finish(run)
        if run.reason == "SIGTERM":
            raise SystemExit(PREEMPTED)
        return Result.of(run)

    def evaluate(
        self, task: Task, data: Any = None, checkpoint: str | Path | None = None
    ) -> dict[str, float]:
        """Measure ``task`` once: metrics, loss and speed.

        Args:
            data: what to measure on; None takes ``task.eval_data()``.
            checkpoint: whose weights the task gets (a run directory's: its newest good one's); None
                keeps its own.

        Returns:
            Scalars by name: ``eval/loss``, ``eval/accuracy``, ``eval/runtime`` in seconds …
        """
        if ranks := start_ranks(self.options):
            return on_ranks(ranks, self, "evaluate", task, data, checkpoint)  # type: ignore[no-any-return]
        with _inference(task, self.options, self._subscriptions, checkpoint) as run:
            given, what = _given(task, "eval_data", data)
            sources = setup.open_eval_sources(given, self.options, run.strategy, what)
            metrics: dict[str, float] = run.loops.eval.run(run, sources)
            if run.events.eval_end is not None:
                run.events.eval_end(run, metrics)
        return metrics

    def predict(
        self,
        task: Task,
        data: Any = None,
        checkpoint: str | Path | None = None,
        writer: Callable[[Any], None] | None = None,
    ) -> Any:
        """Predictions of ``task``, in the order of the data, each sample once.

        Args:
            data: what to predict; None takes ``task.predict_data()``.
            checkpoint: whose weights the task gets (a run directory's: its newest good one's); None
                keeps its own.
            writer: gets each batch's predictions instead, on the first rank; then nothing is
                returned.
        """
        if ranks := start_ranks(self.options):
            return on_ranks(ranks, self, "predict", task, data, checkpoint, writer)
        with _inference(task, self.options, self._subscriptions, checkpoint) as run:
            given, what = _given(task, "predict_data", data)
            source = open_source(
                given, setup.reading(self.options, run.strategy, training=False), what
            )
            return run.loops.predict.run(run, source, writer)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values."""
        return self.options.to_dict()


@contextmanager
def _errors_told(run: Run) -> Iterator[None]:
    """Inside: an exception is shown to ``on_error`` on its way out."""
    try:
        yield
    except BaseException as error:
        if run.events.error is not None:
            run.events.error(run, error)
        raise


def _given(task: Task, method: str, data: Any) -> tuple[Any, str]:
    """``data``, or else what the task's ``method`` returns; and what to call it in an error."""
    return (
        (getattr(task, method)(), f"{name_of(task)}.{method}()") if data is None else (data, "data")
    )


@contextmanager
def _training(task: Task, options: Options, subscriptions: list[Subscription]) -> Iterator[Run]:
    """A run ready to train: built, locked, resumed; told of errors, and closed whatever happens."""
    console = build_progress(options.progress)
    listeners: list[Hook] = [*subscriptions, *([console] if console else [])]
    run = setup.build_training(task, options, listeners)
    locks: list[RunLock] = []
    world, failed = run.strategy.world, True
    try:
        with _errors_told(run):
            run.run_dir = run_dir = world.run_on_rank_zero(
                lambda: setup.choose_run_dir(options, task)
            )
            world.run_on_rank_zero(lambda: locks.append(RunLock(run_dir, str(run_dir))))
            open_checkpointer(run)
            run.loggers = Loggers(build_loggers(options.loggers) if run.strategy.rank == 0 else ())
            about = {
                "task": name_of(task),
                "hparams": dict(task.hparams),
                "options": options.to_dict(),
            }
            run.loggers.open(run.run_dir, run.progress.step, about)
            for logger in run.loggers:
                run.history = list(getattr(logger, "rows", [])) or run.history
            run.history = world.broadcast_object(run.history)
            with signals(run), setup.torch_settings(options):
                _start(run)
                yield run
        failed = False
    finally:
        run.loggers.close("failed" if failed else run.status)
        if run.train_loader is not None:
            run.train_loader.source.close()
        for source in run.evaluation.values():
            source.close()
        if run.checkpointer is not None:
            run.checkpointer.close()
        run.strategy.teardown(failed)
        for lock in locks:
            lock.release()


def _start(run: Run) -> None:
    if run.events.setup is not None:
        run.events.setup(run)
    setup.warn_of_batch_norm(run)
    if run.resumed_from is not None and run.events.load is not None:
        run.events.load(run, run.resumed_from)
    if run.events.fit_start is not None:
        run.events.fit_start(run)
    run.start_clock()
    first = run.options.eval_first and run.progress.step == 0
    if run.evaluation and (first or run.triggers.pop("eval")):
        evaluate_within(run)


def _finish(run: Run) -> None:
    """The run is over: wait for its last checkpoint, take the best one's weights if asked to, and
    say so.
    """
    run.tick()
    if run.checkpointer is not None:
        run.checkpointer.finish(run)
    for optimizer in schedule_free_optimizers(run.optimizers.values()):
        optimizer.eval()
    if run.checkpointer is not None:
        best = run.checkpointer.best(run)
        if run.best:
            run.best["checkpoint"] = best
        if run.checkpointer.settings.load_best and best is not None:
            run.strategy.load_model_state(
                load_snapshot(best, run.checkpointer.store).tensors["model"]
            )
    if run.events.fit_end is not None:
        run.events.fit_end(run)


@contextmanager
def _inference(
    task: Task, options: Options, subscriptions: list[Subscription], checkpoint: str | Path | None
) -> Iterator[Run]:
    run, failed = setup.build_inference(task, options, subscriptions), True
    try:
        with _errors_told(run), setup.torch_settings(options):
            if checkpoint is not None:
                snapshot = load_snapshot(Path(checkpoint), Store(maps=run.strategy.sharded))
                check_model(run, snapshot, Path(checkpoint))
                run.strategy.load_model_state(snapshot.tensors["model"])
            if run.events.setup is not None:
                run.events.setup(run)
            yield run
        failed = False
    finally:
        run.strategy.teardown(failed)


def _dry_run(fit: Fit, task: Task) -> Result:
    """One step, one evaluation batch, a checkpoint, a resume from it and one more step; then all is
    as before.
    """
    before = {name: tensor.detach().clone() for name, tensor in task.state_dict().items()}
    with tempfile.TemporaryDirectory(prefix="loopkit-dry-run-") as place:
        common: dict[str, Any] = {
            "dry_run": False,
            "epochs": None,
            "time": None,
            "limit_eval": 1,
            "run_dir": place,
            "checkpoint": fit.options.checkpoint or True,
            "eval_first": False,
            "eval_after": None,
            "log_every": 1,
        }
        if fit.options.eval_every != "never":
            common["eval_every"] = str(Duration.parse(1, "eval_every"))
        trial = Fit()
        trial._subscriptions = [
            *fit._subscriptions,
            Subscription("step_end", lambda run, out: run.stop("dry run")),
        ]
        trial.options = replace(fit.options, steps=2, resume=None, **common)
        trial.run(task)
        trial._subscriptions = fit._subscriptions
        trial.options = replace(trial.options, resume="auto")
        result = trial.run(task)
        result.run_dir = result.checkpoint = None
    put_all(task.state_dict(), before)
    return result
