"""Task: the user's module, with its steps, metrics, optimizers and data."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Self

import loopkit.checkpoint
import loopkit.storage
from loopkit import hparams, module_state
from loopkit.errors import CheckpointError, LoopkitWarning, OptionError, TaskError
from loopkit.loggers.media import LogsMedia, Media

Reduce = Literal["mean", "sum", "max", "min", "last"]
REDUCTIONS = ("mean", "sum", "max", "min", "last")
Logged = tuple[str, Any, str]


class LogCollector:
    """Collects the values that a task logs while a loop calls one of its methods.

    As a context it gives the list of (name, value, reduction). Outside of it values are dropped: a
    task that is called by hand keeps none.

    Attributes:
        values: the list that values are added to; None outside of every context.
    """

    def __init__(self) -> None:
        self.values: list[Logged] | None = None
        self._outer: list[list[Logged] | None] = []
        self.media: dict[str, Media] = {}

    def __enter__(self) -> list[Logged]:
        self._outer.append(self.values)
        self.values = []
        return self.values

    def __exit__(self, *error: object) -> None:
        self.values = self._outer.pop()

    def add(self, name: str, value: Any, reduce: str) -> None:
        """Collect one value; drop it where no loop collects."""
        if self.values is not None:
            detached = value.detach() if isinstance(value, Tensor) else value
            self.values.append((name, detached, reduce))

    def add_media(self, media: Media) -> None:
        """Collect the latest value of each name; drop it where no loop collects."""
        if self.values is not None:
            self.media[media.name] = media.kept()

    def take_media(self) -> list[Media]:
        """Return what was collected, and forget it."""
        taken, self.media = self.media, {}
        return list(taken.values())


class Task(LogsMedia, nn.Module):
    """A module that defines how it is trained: its steps, metrics, optimizers and data.

    A task never sees the engine: ``task.train_step(batch)`` can be called and tested alone. Layers
    are plain attributes. A task may define any event of ``loopkit.Hook`` as a method
    (``on_fit_start`` …): it is the first listener of its own run. It may define
    ``count_samples(batch)``, which returns the number of samples in a batch, for data that makes
    its own batches of a kind whose number of samples cannot be read off.

    Attributes:
        hparams: the constructor's arguments by name, with defaults, recorded before ``__init__``.
        log_collector: collects the values that ``log`` is given while a loop calls a step.
        eval_set: the set that is measured now, as the names of its metrics begin: "eval",
            "eval/far", "test"; "" while nothing is measured.
    """

    eval_set: str = ""
    hparams: dict[str, Any]
    log_collector: LogCollector

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the constructor's arguments; ``__init__`` reports those that do not fit."""
        self = super().__new__(cls)
        self.__dict__["hparams"] = hparams.record(cls, args, kwargs)
        self.__dict__["log_collector"] = LogCollector()
        return self

    def __repr__(self) -> str:
        said = {name: reprlib.repr(value) for name, value in self.hparams.items()}
        given = ", ".join(f"{name}={text}" for name, text in said.items() if text != "()")
        _, _, modules = super().__repr__().removesuffix(")").rstrip().partition("(")
        return f"{type(self).__name__}({given})" + (
            f"\n{modules.strip(chr(10))}" if modules else ""
        )

    def train_step(self, batch: Any) -> Any:
        """Return the loss of one micro-batch.

        Args:
            batch: one micro-batch, on the device.

        Returns:
            A scalar tensor, or a mapping with it under ``"loss"``. The mapping may hold
            ``"weight"``, the number of terms that the mean loss averages, as a number or a scalar
            tensor: micro-batches are then combined exactly by it. Its other scalars are logged as
            ``train/…``.
        """
        raise TaskError(
            f"{type(self).__name__} has no train_step: define train_step(self, batch) -> loss to "
            "train it"
        )

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        """Return the measurements of one batch.

        Returns:
            A mapping with ``"loss"``, its ``"weight"`` if it has one, and the arguments that the
            metrics' ``update`` methods take, by name.
        """
        raise TaskError(
            f"{type(self).__name__} has no eval_step: define eval_step(self, batch) -> dict to "
            "evaluate it"
        )

    def test_step(self, batch: Any) -> Mapping[str, Any]:
        """Return the measurements of one batch of a test set; those of ``eval_step`` by default."""
        return self.eval_step(batch)

    def predict_step(self, batch: Any) -> Any:
        """Return the predictions for one batch; ``self(batch)`` unless overridden."""
        return self(batch)

    def metrics(self) -> Mapping[str, Any]:
        """Return metrics by name: objects with ``update``, ``compute`` and ``reset``.

        Each evaluation calls this again, and so has fresh metrics.
        """
        return {}

    def compute_metrics(self, outputs: Any) -> Mapping[str, Any]:
        """Return metrics of the whole evaluation set.

        Args:
            outputs: NumPy arrays of all samples, as ``outputs.preds`` and ``outputs.target``.
        """
        return {}

    def optimizers(self) -> Any:
        """Return the optimizer, or a dict of several by name.

        Each is a spec of ``loopkit.optim``, a torch optimizer, or a pair of a torch optimizer and
        a torch scheduler. A dict around the scheduler, as Lightning has it, says when it is
        stepped: ``(optimizer, {"scheduler": scheduler, "interval": "epoch"})``.

        A method that takes an argument, ``def optimizers(self, run)``, gets the run, for
        ``run.length.steps``, ``run.length.steps_per_epoch`` and ``run.world_size``.
        """
        raise TaskError(
            f"{type(self).__name__} has no optimizers: define optimizers(self), such as "
            "return loopkit.optim.AdamW(lr=1e-3)"
        )

    def configure_model(self) -> None:
        """Build layers that are too large for ``__init__``.

        The engine calls this once, inside the strategy's ``init_context``.
        """

    def loops(self) -> Mapping[str, Any]:
        """Return this task's own loops by name: ``{"step": GanStep()}``. Options of Fit win."""
        return {}

    def train_data(self) -> Any:
        """Return the training data: a Dataset, DataLoader, Loader or iterable of batches."""
        raise TaskError(
            f"{type(self).__name__} has no train_data: define train_data(self) to train it"
        )

    def eval_data(self) -> Any:
        """Return the evaluation data, as ``train_data``, or a dict of it by name; None for none."""
        return None

    def test_data(self) -> Any:
        """Return the data of ``Fit.test``, as ``eval_data``, which training never sees."""
        return None

    def predict_data(self) -> Any:
        """Return the data to predict, as ``train_data``; the evaluation data unless overridden."""
        return self.eval_data()

    def log(self, name: str, value: Any, reduce: Reduce = "mean") -> None:
        """Log a scalar from within a step or an event of this task. Never waits for the device.

        The next log shows the values since the last one, reduced over steps and ranks. Outside of
        a run, the value is dropped.

        Args:
            name: the full name, such as ``"train/accuracy"``.
            value: a number or a scalar tensor.
            reduce: "mean", "sum", "max", "min" or "last".

        Raises:
            OptionError: an unknown reduction.
        """
        if reduce not in REDUCTIONS:
            raise OptionError(
                f"log({name!r}, reduce={reduce!r}): give one of {', '.join(REDUCTIONS)}"
            )
        self.log_collector.add(name, value, reduce)

    def _log_media(self, media: Media) -> None:
        """Log an image and so on from within a step or an event of this task, as ``log`` does.

        The next log shows the latest value of each name.
        """
        self.log_collector.add_media(media)

    def checkpoint_files(self) -> Mapping[str, bytes]:
        """Return further small files for checkpoints and exports, by name."""
        return {}

    def check_files(self, files: Mapping[str, bytes], path: Path) -> None:
        """Refuse the checkpoint at ``path`` for what its further files hold.

        Raises:
            CheckpointError: the checkpoint is not one of this task.
        """

    @classmethod
    def load(cls, checkpoint: str | Path, /, *, strict: bool = True, **arguments: Any) -> Self:
        """Return the task of a checkpoint, built with its saved arguments and weights.

        Args:
            checkpoint: a checkpoint directory, or a run directory for its newest valid one; a path
                or a URL, or a ``ray.train.Checkpoint``.
            strict: False loads the weights whose names and shapes fit, and warns of the others.
                Saved arguments that the constructor no longer takes are left out in the same way.
            arguments: constructor arguments that replace the saved ones, or that could not be
                saved.

        Raises:
            CheckpointError: the checkpoint is not valid, or its arguments or weights do not fit.
        """
        checkpoint = loopkit.storage.place_of(checkpoint, "checkpoint")
        with loopkit.storage.fetched(checkpoint) as path:
            snapshot = loopkit.checkpoint.load_snapshot(path)
        check_state, reading = loopkit.checkpoint.check_state, loopkit.checkpoint.reading
        check_state(
            snapshot.state, checkpoint, ("task",), only=("task", "extra_state", "new_buffers")
        )
        saved, unsaved = snapshot.state["task"]["hparams"], snapshot.state["task"]["unsaved"]
        arguments = cls._from_files(snapshot.files, {*saved, *arguments}) | arguments
        lost = [name for name in unsaved if name not in arguments]
        if lost:
            raise CheckpointError(
                f"{checkpoint} could not keep {cls.__name__}'s argument(s) {', '.join(lost)}: "
                f"give them to load, as {cls.__name__}.load(path, {'=..., '.join(lost)}=...)"
            )
        given = saved | arguments
        old = [name for name in hparams.unknown(cls, given) if name not in arguments]
        if old:
            _report(
                f"{checkpoint} was saved with the argument(s) {', '.join(old)}, which "
                f"{cls.__name__} does not take now",
                strict,
            )
        with reading(checkpoint, "task.hparams"):
            task = hparams.construct(cls, {n: value for n, value in given.items() if n not in old})
        configure(task)
        task.check_files(snapshot.files, Path(checkpoint))
        weights = snapshot.tensors.get("model", {})
        own = module_state.tensors_of(task.state_dict())
        new_buffers = snapshot.state.get("new_buffers", ())
        wrong = module_state.differences(task, own, weights, new_buffers)
        module_state.make_room(task, weights, new_buffers)
        if wrong:
            _report(f"the weights of {checkpoint} do not fit {cls.__name__}: {wrong}", strict)
            own = module_state.tensors_of(task.state_dict())
            weights = {n: t for n, t in weights.items() if n in own and t.shape == own[n].shape}
        try:
            task.load_state_dict(weights, strict=False)
            with reading(checkpoint, "extra_state"):
                extra = snapshot.state.get("extra_state", {})
                module_state.load_extra_state(task, extra, checkpoint)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights of {checkpoint} do not fit {cls.__name__}: {error}"
            ) from error
        return task

    @classmethod
    def _from_files(cls, files: Mapping[str, bytes], given: Collection[str]) -> dict[str, Any]:
        """Return the constructor arguments, without the ``given`` ones, made of further files."""
        return {}


def overrides(task: Task, method: str) -> bool:
    """Return whether a task defines ``method`` itself, in its class or as an attribute."""
    return getattr(getattr(task, method), "__func__", None) is not getattr(Task, method)


def eval_step_of(task: Task) -> str:
    """Return the name of the step that measures the present set."""
    testing = task.eval_set.partition("/")[0] == "test"
    return "test_step" if testing and overrides(task, "test_step") else "eval_step"


@contextmanager
def measured_set(task: Task, name: str) -> Iterator[None]:
    """Inside, ``task.eval_set`` is ``name``."""
    before, task.eval_set = task.eval_set, name
    try:
        yield
    finally:
        task.eval_set = before


def name_of(task: nn.Module) -> str:
    """Return the name of the user's class, from which a strategy may have derived its own."""
    return next(
        kind.__name__
        for kind in type(task).__mro__
        if not kind.__module__.startswith("torch.distributed")
    )


def configure(task: Task) -> None:
    """Call ``configure_model``, once for each task."""
    if not task.__dict__.get("_configured", False):
        task.configure_model()
        task.__dict__["_configured"] = True


def _report(problem: str, strict: bool) -> None:
    if strict:
        raise CheckpointError(f"{problem}. load(..., strict=False) takes what fits")
    warnings.warn(f"{problem}: the rest is loaded", LoopkitWarning, stacklevel=3)
