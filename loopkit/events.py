"""The events of a run, the Hook that listens to them, and their dispatch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loopkit import foreign_values
from loopkit.durations import Cadence, Duration
from loopkit.errors import OptionError, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from loopkit.run import Run

EVENTS = (
    "setup", "fit_start", "fit_end", "epoch_start", "epoch_end", "step_start", "step_end", "micro_step_end",
    "before_update", "log", "eval_start", "eval_step_end", "eval_end", "eval_interrupted", "predict_step_end",
    "save", "load", "commit", "error",
)  # fmt: skip


class Hook:
    """A listener to the events of a run. Define the events you want; the others cost nothing.

    State that must survive a resume goes through ``state_dict`` and ``load_state_dict``: plain
    Python values and tensors. A checkpoint keeps it under the name of the class and the hook's
    number among hooks of that class.

    Example::

        class PrintLoss(Hook):
            def on_log(self, run, values):
                print(run.progress.step, values["train/loss"])

    Attributes:
        may_request: whether the hook may call ``run.stop`` or ``run.request`` within a step. With
            False for all hooks, several ranks exchange control messages only once a second.
        per_rank_state: whether a checkpoint holds the ``state_dict`` of every rank, and each rank
            gets its own back. Only as many ranks as before can resume it. With False it holds that
            of rank 0 for all, and a warning says where another rank's differs.
    """

    may_request = True
    per_rank_state = False

    def on_setup(self, run: Run) -> None:
        """Listen to the end of the set-up; no step has run."""

    def on_fit_start(self, run: Run) -> None:
        """Listen to the start of training, also after a resume."""

    def on_fit_end(self, run: Run) -> None:
        """Listen to the end of training; the last checkpoint is on disk."""

    def on_epoch_start(self, run: Run) -> None:
        """Listen to the start of a pass over the training data, also after a resume."""

    def on_epoch_end(self, run: Run) -> None:
        """Listen to the end of a pass, which ``run.progress.epoch`` has counted already."""

    def on_step_start(self, run: Run, batches: Sequence[Any]) -> None:
        """Listen to the start of an optimizer step.

        Args:
            run: the run.
            batches: the micro-batches of the step, on the device.
        """

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Listen to the end of an optimizer step, which ``run.progress.step`` has counted already.

        Args:
            run: the run.
            out: the values that the step loop returned.
        """

    def on_micro_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Listen to the end of the backward pass of one micro-batch.

        Args:
            run: the run.
            out: the values that ``train_step`` returned, detached.
        """

    def on_before_update(self, run: Run, grad_norm: Tensor | None) -> None:
        """Listen before the optimizers step: gradients are complete, unscaled and clipped.

        Args:
            run: the run.
            grad_norm: the total norm before clipping, a scalar on the device.
        """

    def on_log(self, run: Run, values: Mapping[str, float]) -> None:
        """Listen to a log.

        Args:
            run: the run.
            values: plain numbers by name, averaged over the steps since the last log.
        """

    def on_eval_start(self, run: Run) -> None:
        """Listen to the start of an evaluation."""

    def on_eval_step_end(self, run: Run, outputs: Mapping[str, Any]) -> None:
        """Listen to the end of one batch of an evaluation.

        Args:
            run: the run.
            outputs: the values that ``eval_step`` returned.
        """

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """Listen to the end of an evaluation.

        Args:
            run: the run.
            metrics: its scalars by full name, such as ``eval/loss``.
        """

    def on_eval_interrupted(self, run: Run) -> None:
        """Listen to a signal that cut an evaluation short. The resumed run begins it again."""

    def on_predict_step_end(self, run: Run, outputs: Any) -> None:
        """Listen to the end of one batch of predictions.

        Args:
            run: the run.
            outputs: the values that ``predict_step`` returned.
        """

    def on_save(self, run: Run, path: Path) -> None:
        """Listen to a save: the checkpoint at ``path`` is durable.

        A background save is reported some steps later. The name of ``path`` has the step that was
        saved, and ``run.progress.step`` is that of the moment.
        """

    def on_load(self, run: Run, path: Path) -> None:
        """Listen to a resume: the state of the checkpoint at ``path`` is loaded."""

    def on_commit(self, run: Run) -> None:
        """Listen to the one moment of each step at which all state agrees."""

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Listen to an exception that ends the run. It is raised again afterwards."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that must survive a resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict`` returned."""


class Subscription(Hook):
    """A function that listens to one event, always or at a cadence of steps or epochs."""

    def __init__(self, event: str, function: Callable[..., None], every: object = None) -> None:
        name = event.removeprefix("on_")
        if name not in EVENTS:
            raise OptionError(
                f"there is no event {event!r}{_meant(name, EVENTS)} Events: {', '.join(EVENTS)}"
            )
        self.event = name
        self.function = function
        self._every = None if every is None else Duration.parse(every, "every")
        self._cadence: Cadence | None = None
        setattr(self, f"on_{name}", self._filtered if self._every else function)

    def _filtered(self, run: Run, *rest: Any) -> None:
        assert self._every is not None
        if self._cadence is None or self._cadence.length != run.length:
            self._cadence = Cadence(self._every, run.length, "every", by_steps=True)
        epoch_ended = run.progress.epoch if run.progress.step_in_epoch == 0 else None
        if self._cadence.is_due(run.progress.step, run.seconds(), epoch_ended):
            self.function(run, *rest)


class Announcer:
    """Shows a person who watches the run what happens, at once. This one shows nothing."""

    def say(self, text: str) -> None:
        """Show a line that stays. A signal handler may call this."""

    def doing(self, text: str) -> None:
        """Show what is done at the moment, beside the progress; "" if it is over."""


def _fan_out(calls: Sequence[Callable[..., None]]) -> Callable[..., None] | None:
    if len(calls) <= 1:
        return calls[0] if calls else None

    def emit(*args: Any) -> None:
        for call in calls:
            call(*args)

    return emit


class Events:
    """The listeners of one run by event: each attribute is None or one callable that calls all.

    A loop reads the attribute and tests it for None before it emits an event. An event without
    listeners costs this one attribute load. The task listens first, then the hooks in order.
    """

    __slots__ = EVENTS

    def __init__(self, listeners: Iterable[object] = ()) -> None:
        listeners = list(listeners)
        for listener in listeners:
            _check_events(listener)
        for event in EVENTS:
            found = [
                getattr(listener, f"on_{event}")
                for listener in listeners
                if listens(listener, event)
            ]
            setattr(self, event, _fan_out(found))

    if TYPE_CHECKING:

        def __getattr__(self, event: str) -> Callable[..., None] | None: ...


class _LoggingTask:
    """The events of a task. Values that the task logs in them go to the run's accumulator."""

    def __init__(self, task: Any) -> None:
        for event in EVENTS:
            if listens(task, event):
                setattr(self, f"on_{event}", self._collecting(task, getattr(task, f"on_{event}")))

    @staticmethod
    def _collecting(task: Any, method: Callable[..., None]) -> Callable[..., None]:
        def emit(run: Run, *args: Any) -> None:
            collector = task.log_collector
            earlier, collector.media = collector.media, {}
            with collector as logged:
                method(run, *args)
            for name, value, reduce in logged:
                run.accumulator.add(name, value, reduce=reduce)
            for media in collector.take_media():
                run.loggers.log_media(media, run.progress.step)
            collector.media = earlier  # of the task's steps: the next row shows them

        return emit


def logging_to_accumulator(task: object) -> object:
    """Return a listener that calls the events of ``task`` and logs what it logs in them."""
    _check_events(task)
    return _LoggingTask(task)


def listens(listener: object, event: str) -> bool:
    """Return whether a hook, a task or a subscription defines a method for ``event``."""
    method = getattr(listener, f"on_{event}", None)
    return method is not None and getattr(method, "__func__", method) is not getattr(
        Hook, f"on_{event}"
    )


def _meant(name: str, known: Iterable[str]) -> str:
    foreign = foreign_values.answer(foreign_values.EVENTS, f"on_{name.removeprefix('on_')}")
    return f"{foreign}." if foreign else f".{nearest(name, known)}"


def _check_events(listener: object) -> None:
    """Refuse methods that are no event, and those that cannot take what their event passes."""
    known = {f"on_{event}" for event in EVENTS}
    for name in dir(type(listener)):
        if name.startswith("on_") and name not in known:
            where = f"{type(listener).__name__}.{name}"
            raise OptionError(
                f"{where} is no event{_meant(name, known)} Other methods need another name than on_*"
            )
    for event in EVENTS:
        if listens(listener, event):
            _check_parameters(listener, event)


def _check_parameters(listener: object, event: str) -> None:
    method, where = getattr(listener, f"on_{event}"), f"{type(listener).__name__}.on_{event}"
    if isinstance(listener, Subscription):
        method, where = listener.function, f"the function given to fit.on({event!r})"
    passed = list(inspect.signature(getattr(Hook, f"on_{event}")).parameters)[1:]
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):  # a function of C
        return
    try:
        signature.bind(*passed)
    except TypeError as error:
        raise OptionError(
            f"{where} takes {signature}, and the event passes ({', '.join(passed)}). What a Trainer "
            "passes as args, state and control is in run: run.options, run.progress, run.stop(...)"
        ) from error
