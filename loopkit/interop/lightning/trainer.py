"""TrainerView: what a LightningModule, its data module and its callbacks see as their trainer."""

from __future__ import annotations

import copy
import inspect
import math
import os
import weakref
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.optim import Optimizer

from loopkit.interop.lightning.ckpt_file import save_ckpt
from loopkit.interop.lightning.log import LightningLog
from loopkit.interop.lightning.optimizers import LightningSchedulers
from loopkit.interop.lightning.views import LoggerView, StrategyView
from loopkit.run import Progress

if TYPE_CHECKING:
    from loopkit.interop.lightning.loops import ManualGradients
    from loopkit.run import Run


class TrainerView:
    """The part of Lightning's Trainer that modules, data modules and callbacks use.

    Values are read from the run where they are asked for. An attribute that is not here raises an
    AttributeError with those that are.

    Args:
        module: the LightningModule.
        datamodule: its data module; None without one.
        callbacks: Lightning's callbacks.

    Attributes:
        run: returns the run; None outside of one.
        log: what the module logs.
        schedulers: the module's schedulers.
        stage: "train", "validation", "test", "predict", or "" outside of all.
        batch: the number of the batch at hand: in its epoch, or in its data set.
        closing: whether an epoch was counted by the run whose end Lightning has not reached yet.
        optimizer_steps: updates by hand, of all optimizers.
        gradients: sums gradients over the ranks in manual optimization.
        stepping: the optimizer that the module itself steps; None without one.
        should_stop: True ends the run after this step.
    """

    def __init__(self, module: Any, datamodule: Any, callbacks: list[Any]) -> None:
        self.lightning_module = self.model = module
        self.datamodule = datamodule
        self.callbacks = callbacks
        self.log = LightningLog(module)
        self.schedulers = LightningSchedulers()
        self.stage = ""
        self.batch = 0
        self.closing = False
        self.optimizer_steps = 0
        self.gradients: ManualGradients | None = None
        self.stepping: Optimizer | None = None
        self.strategy = StrategyView(self)
        self.precision_plugin = self.strategy
        self.train_dataloader: Any = None
        self.val_dataloaders: Any = None
        self.test_dataloaders: Any = None
        self.predict_dataloaders: Any = None
        self.optimizers: list[Optimizer] = []
        self._run: Callable[[], Run | None] = _no_run
        self._progress = Progress()  # stays when the run is over
        # What Lightning's own `LightningModule.log` looks at.
        vars(self)["_logger_connector"] = SimpleNamespace(
            should_reset_tensors=lambda hook: False, _current_fx=None
        )

    @property
    def run(self) -> Run | None:
        """The run; None outside of one."""
        return self._run()

    def attach(self, run: Run) -> None:
        """Take values from ``run`` as long as it lives."""
        self._run, self._progress = weakref.ref(run), run.progress
        self.log.rank = run.strategy.rank

    @property
    def should_stop(self) -> bool:
        """Whether the run ends after this step."""
        return self.run is not None and self.run.outcome.ending

    @should_stop.setter
    def should_stop(self, wanted: bool) -> None:
        if wanted and self.run is not None:
            self.run.stop("the module set trainer.should_stop")

    def save_checkpoint(self, filepath: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        """Write a ``.ckpt`` file, which ``load_from_checkpoint`` opens; see ``save_ckpt``."""
        save_ckpt(self, filepath)

    def print(self, *values: Any, **options: Any) -> None:
        """Print on rank 0."""
        if self.is_global_zero:
            print(*values, **options)

    def __getattr__(self, name: str) -> Any:
        if name in _VALUES:
            return _VALUES[name](self)
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"the trainer of a LightningTask has no {name!r}: it has {', '.join(known_names())}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainerView:
        made = object.__new__(TrainerView)
        memo[id(self)] = made
        vars(made).update(copy.deepcopy({**vars(self), "_run": _no_run}, memo))
        return made


def _no_run() -> None:
    return None


def known_names() -> list[str]:
    """Return the public names that a module may use of its trainer."""
    own = (
        "callbacks", "datamodule", "lightning_module", "model", "optimizers", "print", "save_checkpoint",
        "should_stop", "strategy", "test_dataloaders", "train_dataloader", "val_dataloaders",
    )  # fmt: skip
    return sorted({*own, *(name for name in _VALUES if not name.startswith("_"))})


def _ranks() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _epoch(view: TrainerView) -> int:
    return view._progress.epoch - view.closing


def _step(view: TrainerView) -> int:
    by_hand = not view.lightning_module.automatic_optimization
    return view.optimizer_steps if by_hand else view._progress.step


def _option(name: str, default: Any = None) -> Callable[[TrainerView], Any]:
    def read(view: TrainerView) -> Any:
        value = getattr(view.run.options, name) if view.run is not None else None
        return default if value is None else value

    return read


def _length(name: str, default: float) -> Callable[[TrainerView], Any]:
    def read(view: TrainerView) -> Any:
        value = getattr(view.run.length, name) if view.run is not None else None
        return default if value is None else value

    return read


def _training_batches(view: TrainerView) -> float:
    run = view.run
    steps = None if run is None else run.length.steps_per_epoch
    if run is None or steps is None:
        return math.inf
    return steps * run.train_loader.accumulate


def _evaluation_batches(view: TrainerView) -> list[float]:
    data = view.run.eval_data.values() if view.run is not None else ()
    counts = [source.batches_per_epoch() for source in data]
    return [math.inf if count is None else count for count in counts]


def _loggers(view: TrainerView) -> list[Any]:
    run = view.run
    if run is None or not run.options.loggers:
        return []
    return [LoggerView(run)]


def _is(stage: str) -> Callable[[TrainerView], bool]:
    return lambda view: view.stage == stage


def _run_dir(view: TrainerView) -> str | None:
    return None if view.run is None or view.run.run_dir is None else str(view.run.run_dir)


_STAGES = {"train": "fit", "validation": "validate", "test": "test", "predict": "predict"}
_VALUES: Mapping[str, Callable[[TrainerView], Any]] = {
    "current_epoch": _epoch,
    "global_step": _step,
    "max_epochs": _length("epochs", 1),
    "min_epochs": lambda view: None,
    "max_steps": _option("steps", -1),
    "estimated_stepping_batches": _length("steps", math.inf),
    "num_training_batches": _training_batches,
    "num_val_batches": _evaluation_batches,
    "num_test_batches": _evaluation_batches,
    "num_sanity_val_steps": lambda view: 0,
    "num_sanity_val_batches": lambda view: [],
    "enable_validation": lambda view: bool(view.run is not None and view.run.eval_data),
    "limit_train_batches": _option("limit_train", 1.0),
    "limit_val_batches": _option("limit_eval", 1.0),
    "limit_test_batches": _option("limit_eval", 1.0),
    "overfit_batches": _option("overfit", 0.0),
    "distributed_sampler_kwargs": lambda view: dict(zip(("rank", "num_replicas"), _ranks())),
    "sanity_checking": lambda view: False,
    "fast_dev_run": lambda view: False,
    "barebones": lambda view: False,
    "accumulate_grad_batches": lambda view: view.run.train_loader.accumulate if view.run else 1,
    "gradient_clip_val": _option("clip_norm"),
    "gradient_clip_algorithm": lambda view: None,
    "precision": _option("precision", "fp32"),
    "log_every_n_steps": _option("log_every", 50),
    "world_size": lambda view: _ranks()[1],
    "num_devices": lambda view: int(os.environ.get("LOCAL_WORLD_SIZE", _ranks()[1])),
    "num_nodes": lambda view: view.world_size // view.num_devices,
    "global_rank": lambda view: _ranks()[0],
    "local_rank": lambda view: int(os.environ.get("LOCAL_RANK", 0)),
    "node_rank": lambda view: view.global_rank // view.num_devices,
    "is_global_zero": lambda view: _ranks()[0] == 0,
    "is_last_batch": lambda view: view.batch + 1 == view.num_training_batches,
    "training": _is("train"),
    "validating": _is("validation"),
    "testing": _is("test"),
    "predicting": _is("predict"),
    "evaluating": lambda view: view.stage in ("validation", "test"),
    "state": lambda view: SimpleNamespace(fn=_STAGES.get(view.stage), stage=view.stage),
    "callback_metrics": lambda view: view.log.values,
    "logged_metrics": lambda view: view.log.values,
    "progress_bar_metrics": lambda view: view.log.values,
    "lr_scheduler_configs": lambda view: view.schedulers.configs,
    "logger": lambda view: next(iter(_loggers(view)), None),
    "loggers": _loggers,
    "log_dir": _run_dir,
    "default_root_dir": lambda view: _run_dir(view) or os.getcwd(),
    "progress_bar_callback": lambda view: None,
    "checkpoint_callback": lambda view: None,
    "early_stopping_callback": lambda view: None,
    "_results": lambda view: None if view.stage == "predict" else view.log,
    "_accelerator_connector": lambda view: SimpleNamespace(is_distributed=False),
}


def accepted(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function`` with as many of the arguments as it takes by position."""
    return function(*arguments[: arguments_of(function)])


def arguments_of(function: Callable[..., Any]) -> int | None:
    """Return how many arguments a function takes by position; None for any number."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
