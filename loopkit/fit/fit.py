"""Fit: train, evaluate and predict with a Task."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from loopkit.console import build_progress
from loopkit.data.sources import open_source
from loopkit.distributed.environment import is_rank_zero
from loopkit.durations import Duration
from loopkit.errors import OptionError
from loopkit.events import Subscription
from loopkit.fit import setup
from loopkit.fit.given_data import like_data_of
from loopkit.fit.lifecycle import finish, inference, training
from loopkit.fit.notebook import on_ranks
from loopkit.fit.prepared import Prepared, prepared
from loopkit.fit.signals import PREEMPTED, PREEMPTIONS
from loopkit.fit.strategy_setup import start_ranks
from loopkit.foreign_values import FIT_METHODS, answer
from loopkit.keywords import checks_keywords
from loopkit.options import Options
from loopkit.preserve import preserved_modes
from loopkit.result import Result
from loopkit.task import Task, measured_set, name_of

P = ParamSpec("P")
T = TypeVar("T")


def _with_signature_of(
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


@checks_keywords
class Fit:
    """Train, evaluate and predict with a Task. ``loopkit.options.Options`` lists every option.

    Example::

        result = Fit(epochs=3, precision="bf16", clip_norm=1.0).run(task)

    Raises:
        OptionError: an unknown option, or a value that is not accepted.
    """

    @_with_signature_of(Options)
    def __init__(self, *arguments: Any, **options: Any) -> None:
        if arguments:
            raise OptionError(
                f"Fit takes options by name, and got a {type(arguments[0]).__name__}: a task is "
                "trained by Fit(...).run(task)"
            )
        self.options = Options(**options)
        self._subscriptions: list[Subscription] = []

    def __repr__(self) -> str:
        given = vars(self.options).items()
        changed = [f"{name}={value!r}" for name, value in given if value != getattr(Options, name)]
        return f"Fit({', '.join(changed)})"

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"Fit has no {name!r}{answer(FIT_METHODS, name)}")

    def on(
        self, event: str, function: Callable[..., None] | None = None, *, every: object = None
    ) -> Any:
        """Subscribe a function to an event. Without a function, return a decorator.

        Example::

            @fit.on("step_end", every="100 steps")
            def show(run, out): ...

        Args:
            event: the name of an event of ``loopkit.Hook``, with or without ``on_``.
            function: a function with the parameters of the event's method; None for a decorator.
            every: call it only this often, in the form of ``eval_every``; None for always.

        Raises:
            OptionError: there is no such event, or ``every`` is not a duration.
        """

        def subscribe(listener: Callable[..., None]) -> Callable[..., None]:
            self._subscriptions.append(Subscription(event, listener, every))
            return listener

        return subscribe if function is None else subscribe(function)

    def run(self, task: Task, *data: Any) -> Result:
        """Train ``task`` from the start, or from the checkpoint that ``resume`` names.

        In short::

            set up the strategy, the data, the optimizers and the triggers
            create and lock the run directory; load the checkpoint to resume from
            on_setup, on_load, on_fit_start
            while not run.finished():
                loops.epoch.run(run)            # EpochLoop.run
            wait for the last save; load the best weights if wanted
            on_fit_end
            close everything, also after an error (which on_error sees first)

        Args:
            task: the task. It returns its own data, and ``data`` takes none.

        Returns:
            The result, of a run that also may have been stopped or interrupted.

        Raises:
            LoopkitError: by kind, see ``loopkit.errors``.
            SystemExit: with code 143, after SIGTERM or SIGHUP and a save.
        """
        if data:
            raise OptionError(
                f"Fit.run takes the task alone, and got a {type(data[0]).__name__} too: the "
                "methods train_data and eval_data of the task return its data"
            )
        if ranks := start_ranks(self.options):
            return on_ranks(ranks, self, "run", task)  # type: ignore[no-any-return]
        if self.options.dry_run:
            return _dry_run(self, task)
        with training(task, self.options, self._subscriptions) as run:
            while not run.finished():
                run.loops.epoch.run(run)
            finish(run)
        if run.outcome.reason in PREEMPTIONS:
            raise SystemExit(PREEMPTED)
        return Result.of(run)

    def prepare(self, task: Task, *others: Any) -> AbstractContextManager[Prepared]:
        """Prepare a task for a loop written by hand: processes, devices, data and optimizers.

        The loop computes what ``run`` computes, to the bit, on any number of ranks. It has no
        events, logs and checkpoints. ``epochs`` and ``steps`` tell schedules how long it will be.

        Example::

            with Fit(strategy="ddp", devices=2, epochs=3).prepare(task) as prepared:
                for epoch in range(3):
                    for batch in prepared.batches():
                        prepared.backward(prepared.forward(batch))
                        prepared.step()

        Args:
            task: the task. It makes its own data and optimizers, and ``others`` takes none.

        Raises:
            OptionError: an option, or an event of the task, that a loop by hand would pass over.
            SystemExit: this process only started the ranks, and they have ended.
        """
        if others:
            raise OptionError(
                f"Fit.prepare takes the task alone, and got a {type(others[0]).__name__} too: the "
                "methods optimizers and train_data of the task return them"
            )
        if start_ranks(self.options):
            raise OptionError(
                "Fit.prepare starts ranks that run a script, and this session has none: put the loop "
                "into a file, or give devices=1"
            )
        return prepared(task, self.options)

    def evaluate(
        self, task: Task, data: Any = None, checkpoint: str | Path | None = None
    ) -> dict[str, float]:
        """Evaluate ``task`` once.

        Args:
            task: the task.
            data: the data to evaluate on; None takes ``task.eval_data()``. Samples that no Loader
                or DataLoader holds are put together as in the task's own data.
            checkpoint: a checkpoint whose weights the task gets, or a run directory for its newest
                valid one. None keeps the task's weights.

        Returns:
            Scalars by name: ``eval/loss``, ``eval/accuracy``, ``eval/runtime`` in seconds …
        """
        return self._measure("evaluate", "eval", task, data, checkpoint)

    def test(
        self, task: Task, data: Any = None, checkpoint: str | Path | None = None
    ) -> dict[str, float]:
        """Measure ``task`` once on its test data, with ``test_step``.

        Args:
            task: the task.
            data: the data to test on; None takes ``task.test_data()``. Samples that no Loader
                or DataLoader holds are put together as in the task's own data.
            checkpoint: a checkpoint whose weights the task gets, or a run directory for its newest
                valid one. None keeps the task's weights.

        Returns:
            Scalars by name, as ``evaluate`` does: ``test/loss``, ``test/accuracy`` …
        """
        return self._measure("test", "test", task, data, checkpoint)

    def _measure(
        self, call: str, kind: str, task: Task, data: Any, checkpoint: str | Path | None
    ) -> dict[str, float]:
        if ranks := start_ranks(self.options):
            return on_ranks(ranks, self, call, task, data, checkpoint)  # type: ignore[no-any-return]
        with inference(task, self.options, self._subscriptions, checkpoint) as run:
            data, what = _data_of(task, f"{kind}_data", data)
            run.eval_data = setup.open_eval_sources(data, task, self.options, run.strategy, what)
            with preserved_modes(run.task, run.strategy.device), measured_set(run.task, kind):
                metrics: dict[str, float] = run.loops.eval.run(run, run.eval_data)
                if run.events.eval_end is not None:
                    run.events.eval_end(run, metrics)
            return metrics | run.accumulator.take(run.strategy.dp.all_gather_object)

    def predict(
        self,
        task: Task,
        data: Any = None,
        checkpoint: str | Path | None = None,
        writer: Callable[[Any], None] | None = None,
    ) -> Any:
        """Return the predictions of ``task``, in the order of the data, each sample once.

        Args:
            task: the task.
            data: the data to predict; None takes ``task.predict_data()``. Samples that no Loader
                or DataLoader holds are put together as in the task's own data.
            checkpoint: a checkpoint whose weights the task gets, or a run directory for its newest
                valid one. None keeps the task's weights.
            writer: a function that gets each batch's predictions on rank 0. Nothing is returned
                then.

        Returns:
            Tensors are concatenated along the samples, and padded with -100 where their widths
            differ. Lists are chained, and dicts, dataclasses and tuples of parts keep their form.

        Raises:
            TaskError: the predictions of two batches have different forms, or a part of them has
                another length than its batch.
        """
        if ranks := start_ranks(self.options):
            return on_ranks(ranks, self, "predict", task, data, checkpoint, writer)
        with inference(task, self.options, self._subscriptions, checkpoint) as run:
            data, what = _data_of(task, "predict_data", data)
            config = setup.data_config(task, self.options, run.strategy, training=False)
            with preserved_modes(run.task, run.strategy.device):
                return run.loops.predict.run(run, open_source(data, config, what), writer)

    def with_options(self, **changes: Any) -> Fit:
        """Return a copy with the same subscriptions, in which the given options are changed.

        Raises:
            OptionError: an unknown option, or a value that is not accepted.
        """
        changed = Fit(**{**vars(self.options), **changes})
        changed._subscriptions = list(self._subscriptions)
        return changed

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return self.options.to_dict()


def _data_of(task: Task, method: str, data: Any) -> tuple[Any, str]:
    """Return ``data``, or else that of the task's ``method``; and its name for errors."""
    if data is not None:
        return like_data_of(task, method, data), "data"
    return getattr(task, method)(), f"{name_of(task)}.{method}()"


def _dry_run(fit: Fit, task: Task) -> Result:
    """Do one step, one evaluation batch, a save, a resume and another step, all on copies.

    Raises:
        OptionError: the task or a hook cannot be copied.
    """
    options = fit.options
    try:
        task, hooks = copy.deepcopy((task, list(options.hooks)))
    except Exception as error:
        raise OptionError(
            "dry_run=True trains a copy of the task and the hooks, and they cannot be copied: "
            f"{type(error).__name__}: {error}"
        ) from error
    with tempfile.TemporaryDirectory(prefix="loopkit-dry-run-") as directory:
        changes: dict[str, Any] = {
            "dry_run": False,
            "steps": 2,
            "epochs": None,
            "time": None,
            "limit_eval": 1,
            "run_dir": directory,
            "checkpoint": options.checkpoint or True,
            "eval_first": False,
            "eval_after": None,
            "log_every": 1,
            "progress": False,
            "hooks": hooks,
        }
        if options.eval_every != "never":
            changes["eval_every"] = str(Duration.parse(1, "eval_every"))
        first = fit.with_options(**changes, resume=None)
        first.on("step_end", lambda run, out: run.stop("dry run"))
        first.run(copy.deepcopy(task))
        result = fit.with_options(**changes, resume="auto").run(task)
        result.run_dir = result.checkpoint = None
        result._next = {}
    console = build_progress(options.progress)
    if console is not None and is_rank_zero():
        measured = ", an evaluation" if any(n.startswith("eval/") for n in result.metrics) else ""
        console.note(
            f"dry run: a step{measured}, a save, a resume and another step were done. Nothing is kept"
        )
    return result
