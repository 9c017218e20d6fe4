"""The events of a run, the Hook that listens to them, and their dispatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loopkit.durations import Cadence, Duration
from loopkit.errors import OptionError, nearest

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from loopkit.run import Run

EVENTS = (
    "setup", "fit_start", "fit_end", "epoch_start", "epoch_end", "step_start", "step_end", "micro_step_end",
    "before_update", "log", "eval_start", "eval_step_end", "eval_end", "predict_step_end", "save", "load",
    "commit", "error",
)  # fmt: skip


class Hook:
    """Something that listens. Override the events wanted; the others cost nothing.

    State that must survive a resume goes through ``state_dict`` and ``load_state_dict``: plain
    Python values and tensors. It is saved under the class name and its occurrence among the run's
    hooks.

    Attributes:
        may_request: whether it may ask for anything (``run.stop``, ``run.request``) within a step: False
            lets several ranks train on for about a second without telling each other what is asked
            for.
    """

    may_request = True

    def on_setup(self, run: Run) -> None:
        """Everything is built and placed; nothing has run."""

    def on_fit_start(self, run: Run) -> None:
        """Training starts, or goes on after a resume."""

    def on_fit_end(self, run: Run) -> None:
        """Training is over; the last checkpoint is on disk."""

    def on_epoch_start(self, run: Run) -> None:
        """A pass over the training data starts, or goes on after a resume."""

    def on_epoch_end(self, run: Run) -> None:
        """A pass is complete; ``run.progress.epoch`` counts it already."""

    def on_step_start(self, run: Run, batches: Sequence[Any]) -> None:
        """One optimizer step starts, over these micro-batches, on the device."""

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """One optimizer step is complete and counted; ``out`` holds what the step loop returned."""

    def on_micro_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """The backward pass of one micro-batch is done; ``out`` is what ``train_step`` returned."""

    def on_before_update(self, run: Run, grad_norm: Tensor | None) -> None:
        """Gradients are complete, unscaled and clipped, and not yet used; ``p.grad`` is alive.

        ``grad_norm`` is the total norm before clipping, a scalar on the device; None when nothing
        clips.
        """

    def on_log(self, run: Run, values: Mapping[str, float]) -> None:
        """Values are logged: plain numbers, averaged over the steps since the last log."""

    def on_eval_start(self, run: Run) -> None:
        """An evaluation starts."""

    def on_eval_step_end(self, run: Run, outputs: Mapping[str, Any]) -> None:
        """One batch is evaluated; ``outputs`` is what ``eval_step`` returned."""

    def on_eval_end(self, run: Run, metrics: Mapping[str, float]) -> None:
        """An evaluation is complete; ``metrics`` are its scalars by full name (``eval/loss``)."""

    def on_predict_step_end(self, run: Run, outputs: Any) -> None:
        """One batch is predicted; ``outputs`` is what ``predict_step`` returned."""

    def on_save(self, run: Run, path: Path) -> None:
        """A checkpoint is durable at ``path``."""

    def on_load(self, run: Run, path: Path) -> None:
        """The state of the checkpoint at ``path`` is restored."""

    def on_commit(self, run: Run) -> None:
        """The one moment of each step when all state agrees."""

    def on_error(self, run: Run, exception: BaseException) -> None:
        """The run ends by this exception, which is raised again afterwards."""

    def state_dict(self) -> dict[str, Any]:
        """What must survive a resume."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""


class Subscription(Hook):
    """A function that listens to one event, at every occurrence or at a cadence of steps or epochs."""

    def __init__(self, event: str, function: Callable[..., None], every: object = None) -> None:
        name = event.removeprefix("on_")
        if name not in EVENTS:
            raise OptionError(
                f"there is no event {event!r}.{nearest(name, EVENTS)} Events: {', '.join(EVENTS)}"
            )
        self.event = name
        self.function = function
        self._every = None if every is None else Duration.parse(every, "every")
        self._cadence: Cadence | None = None
        setattr(self, f"on_{name}", self._filtered if self._every else function)

    def _filtered(self, run: Run, *rest: Any) -> None:
        assert self._every is not None
        if self._cadence is None or self._cadence.length is not run.length:
            self._cadence = Cadence(self._every, run.length, "every")
        epoch_ended = run.progress.epoch if run.progress.step_in_epoch == 0 else None
        if self._cadence.is_due(run.progress.step, run.seconds(), epoch_ended):
            self.function(run, *rest)


def _fan_out(calls: Sequence[Callable[..., None]]) -> Callable[..., None] | None:
    if len(calls) <= 1:
        return calls[0] if calls else None

    def emit(*args: Any) -> None:
        for call in calls:
            call(*args)

    return emit


class Events:
    """The listeners of one run by event: each attribute is None or one callable that reaches them
    all.

    A place that emits reads the attribute and tests it for None, so an event nobody listens to
    costs one attribute load. The Task listens first, then the hooks in order.
    """

    __slots__ = EVENTS

    def __init__(self, listeners: Iterable[object] = ()) -> None:
        listeners = list(listeners)
        for listener in listeners:
            _refuse_unknown_events(listener)
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
            with task.log_collector as logged:
                method(run, *args)
            for name, value, reduce in logged:
                run.accumulator.add(name, value, reduce=reduce)

        return emit


def logging_to_accumulator(task: object) -> object:
    """Return a listener that calls the events of ``task`` and logs what it logs in them."""
    _refuse_unknown_events(task)
    return _LoggingTask(task)


def listens(listener: object, event: str) -> bool:
    """Whether a hook, a task or a subscription has a method of its own for ``event``."""
    method = getattr(listener, f"on_{event}", None)
    return method is not None and getattr(method, "__func__", method) is not getattr(
        Hook, f"on_{event}"
    )


def _refuse_unknown_events(listener: object) -> None:
    known = {f"on_{event}" for event in EVENTS}
    for name in dir(type(listener)):
        if name.startswith("on_") and name not in known:
            where = f"{type(listener).__name__}.{name}"
            raise OptionError(
                f"{where} is no event.{nearest(name, known)} Other methods need another name than "
                f"on_*"
            )
