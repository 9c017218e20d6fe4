"""Task: what one step is, what is measured, what is optimised and where the data comes from."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from typing_extensions import Self

import loopkit.checkpoint
from loopkit.errors import CheckpointError, OptionError, TaskError

Reduce = Literal["mean", "sum", "max", "min", "last"]
REDUCTIONS = ("mean", "sum", "max", "min", "last")
Logged = tuple[str, Any, str]


class LogCollector:
    """Collects the values that a task logs while a loop calls one of its methods.

    As a context it gives the list of (name, value, reduction). Outside of it values are dropped: a
    task that is called by hand keeps none.
    """

    def __init__(self) -> None:
        self._open: list[list[Logged]] = []

    def __enter__(self) -> list[Logged]:
        logged: list[Logged] = []
        self._open.append(logged)
        return logged

    def __exit__(self, *error: object) -> None:
        self._open.pop()

    def add(self, name: str, value: Any, reduce: str) -> None:
        """Collect one value; drop it where no loop collects."""
        if self._open:
            detached = value.detach() if isinstance(value, Tensor) else value
            self._open[-1].append((name, detached, reduce))


class Task(nn.Module):
    """A module that says how it is trained. It never sees the engine: ``task.train_step(batch)``
    works alone.

    Layers are plain attributes. Any event of ``loopkit.Hook`` may be defined as a method
    (``on_fit_start`` …): a Task is the first listener of its own run.

    Attributes:
        hparams: the constructor's arguments by name, defaults included, recorded before
            ``__init__`` runs.
    """

    hparams: dict[str, Any]
    log_collector: LogCollector

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Record the constructor's arguments; ``__init__`` itself reports arguments that do not
        fit.
        """
        self = super().__new__(cls)
        self.__dict__["hparams"] = _arguments(cls, args, kwargs)
        self.__dict__["log_collector"] = LogCollector()
        return self

    def train_step(self, batch: Any) -> Any:
        """The loss of one micro-batch: a scalar tensor, or a mapping with ``"loss"``.

        A mapping may carry ``"weight"``, the number of terms the mean loss averages (a number or
        scalar tensor): micro-batches are then combined exactly by it. Other scalars in it are
        logged as ``train/…``.
        """
        raise TaskError(
            f"{type(self).__name__} has no train_step: define train_step(self, batch) -> loss to "
            f"train it"
        )

    def eval_step(self, batch: Any) -> Mapping[str, Any]:
        """What one batch is measured by: ``loss``, its ``weight``, and what metrics' ``update``
        asks for by name.
        """
        raise TaskError(
            f"{type(self).__name__} has no eval_step: define eval_step(self, batch) -> dict to "
            f"evaluate it"
        )

    def predict_step(self, batch: Any) -> Any:
        """The predictions for one batch; ``self(batch)`` unless overridden."""
        return self(batch)

    def metrics(self) -> Mapping[str, Any]:
        """Metrics by name: anything with ``update``, ``compute`` and ``reset``; asked anew for
        every evaluation.
        """
        return {}

    def compute_metrics(self, outputs: Any) -> Mapping[str, Any]:
        """Metrics of the whole evaluation set at once, from ``outputs.preds`` and
        ``outputs.target`` (NumPy).
        """
        return {}

    def optimizers(self) -> Any:
        """An optimizer: a ``loopkit.optim`` spec, a torch one, a pair with a torch scheduler, or a
        dict of these.
        """
        raise TaskError(
            f"{type(self).__name__} has no optimizers: define optimizers(self), such as "
            "return loopkit.optim.AdamW(lr=1e-3)"
        )

    def configure_model(self) -> None:
        """Build what is too large for ``__init__``; called once, where the strategy wants
        parameters made.
        """

    def loops(self) -> Mapping[str, Any]:
        """This task's own loops by place: ``{"step": GanStep()}``. The options of Fit go before
        them.
        """
        return {}

    def train_data(self) -> Any:
        """What to train on: a Dataset, an IterableDataset, a DataLoader, a Loader or an iterable of
        batches.
        """
        raise TaskError(
            f"{type(self).__name__} has no train_data: define train_data(self) to train it"
        )

    def eval_data(self) -> Any:
        """What to evaluate on: as ``train_data``, or a dict of such by name; None for nothing."""
        return None

    def predict_data(self) -> Any:
        """What to predict: as ``train_data``; the evaluation data unless overridden."""
        return self.eval_data()

    def log(self, name: str, value: Any, reduce: Reduce = "mean") -> None:
        """Log a scalar, averaged (or reduced otherwise) until the next log. Never waits for the
        device.

        Raises:
            OptionError: an unknown reduction.
        """
        if reduce not in REDUCTIONS:
            raise OptionError(
                f"log({name!r}, reduce={reduce!r}): give one of {', '.join(REDUCTIONS)}"
            )
        self.log_collector.add(name, value, reduce)

    def checkpoint_files(self) -> Mapping[str, bytes]:
        """Further files for its checkpoints and exports, by name: small ones that let others open
        them.
        """
        return {}

    def check_files(self, files: Mapping[str, bytes], path: Path) -> None:
        """Refuse, with a CheckpointError, the checkpoint ``path`` for what its further files say."""

    @classmethod
    def load(cls, checkpoint: str | Path, **arguments: Any) -> Self:
        """The task a checkpoint was saved from: built with its recorded arguments, with its
        weights.

        Args:
            checkpoint: a checkpoint directory, or a run directory for its newest good one.
            arguments: constructor arguments to replace, or to give where they could not be saved.

        Raises:
            CheckpointError: it cannot be trusted, or its weights do not fit.
        """
        snapshot = loopkit.checkpoint.load_snapshot(Path(checkpoint))
        saved = snapshot.state["task"]["hparams"]
        arguments = cls._from_files(snapshot.files, {*saved, *arguments}) | arguments
        hparams = saved | arguments
        lost = [name for name in snapshot.state["task"]["unsaved"] if name not in arguments]
        if lost:
            raise CheckpointError(
                f"{checkpoint} could not keep {cls.__name__}'s argument(s) {', '.join(lost)}: "
                f"give them to load, as {cls.__name__}.load(path, {lost[0]}=...)"
            )
        task = cls(**hparams)
        task.configure_model()
        task.check_files(snapshot.files, Path(checkpoint))
        try:
            task.load_state_dict(snapshot.tensors["model"])
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights of {checkpoint} do not fit {cls.__name__}: {error}"
            ) from error
        return task

    @classmethod
    def _from_files(cls, files: Mapping[str, bytes], given: Collection[str]) -> dict[str, Any]:
        """The constructor arguments, but for ``given`` ones, that a checkpoint's further files
        make.
        """
        return {}


def overrides(task: Task, method: str) -> bool:
    """Whether a task defines ``method`` itself, in its class or as an attribute."""
    return getattr(getattr(task, method), "__func__", None) is not getattr(Task, method)


def name_of(task: nn.Module) -> str:
    """The name of the user's class, which a strategy may have derived one of its own from."""
    return next(
        kind.__name__
        for kind in type(task).__mro__
        if not kind.__module__.startswith("torch.distributed")
    )


def _arguments(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        bound = inspect.signature(cls.__init__).bind(None, *args, **kwargs)  # type: ignore[misc]
    except TypeError:
        return {}
    bound.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in list(bound.arguments.items())[1:]:
        if bound.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            found |= value
        else:
            found[name] = value
    return found
