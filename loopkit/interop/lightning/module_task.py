"""LightningTask: an unmodified LightningModule, with its data module and callbacks, as a task."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from loopkit.errors import LoopkitWarning
from loopkit.interop.lightning import left_out
from loopkit.interop.lightning.calls import ModuleCalls
from loopkit.interop.lightning.loaders import LightningData
from loopkit.interop.lightning.log import TRAIN
from loopkit.interop.lightning.loops import (
    LightningEpoch,
    LightningEval,
    LightningPredict,
    LightningStep,
)
from loopkit.interop.lightning.optimizers import LightningSchedulers, parse_optimizers
from loopkit.interop.lightning.resume_state import adapter_state, check_saveable, restore
from loopkit.interop.lightning.trainer import TrainerView
from loopkit.keywords import checks_keywords
from loopkit.run import Run
from loopkit.task import Task


@checks_keywords
class LightningTask(Task):
    """Train a LightningModule of Lightning 2 as it is, of ``lightning`` or ``pytorch_lightning``.

    The module keeps its methods, its names of logged values and its own ``trainer``, which is a
    view of the run. Checkpoints hold its weights under its own names, the state of its metric
    objects and schedulers, and what ``on_save_checkpoint`` adds: a resume is exact at any step.

    Example::

        task = LightningTask(LitClassifier(), datamodule=DigitsData())
        Fit(epochs=3, strategy="ddp").run(task)

    Args:
        module: the LightningModule.
        datamodule: a LightningDataModule; None takes the loaders of the module.
        train_dataloaders: loaders, as ``Trainer.fit`` takes them, in place of the data module's.
        val_dataloaders: the same for the evaluation.
        test_dataloaders: the same for the test.
        predict_dataloaders: the same for predictions.
        callbacks: Lightning's callbacks, whose events are called with those of the module.

    Attributes:
        module: the module itself. ``state_dict`` has its parameters under the module's own names.
        view: what the module sees as its trainer.
        calls: calls the module's steps and events.
        restored: the state of a checkpoint, until the run is set up.

    Raises:
        TaskError: ``module`` is no LightningModule, or it uses what a LightningTask has not; the
            message names it.
    """

    def __init__(
        self,
        module: Any,
        datamodule: Any = None,
        *,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        test_dataloaders: Any = None,
        predict_dataloaders: Any = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        super().__init__()
        self._base = left_out.check_module(module)
        left_out.check_callbacks(callbacks)
        left_out.check_datamodule(datamodule)
        self.module = module
        self.view = TrainerView(module, datamodule, list(callbacks))
        given = (train_dataloaders, val_dataloaders, test_dataloaders, predict_dataloaders)
        self._data = LightningData(self.view, self._base, given)
        self.calls = ModuleCalls(module, self.view, self._data)
        self.restored: Mapping[str, Any] | None = None
        module.trainer = self.view
        if datamodule is not None:
            datamodule.trainer = self.view
        # Listened to only where it is used: it needs the norm of the gradients in every step.
        names = ("on_before_optimizer_step", "configure_callbacks")
        if callbacks or any(left_out.overridden(module, self._base, name) for name in names):
            self.on_before_update = self._before_update
        self.register_state_dict_post_hook(_rename_on_save)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_rename_on_load)  # type: ignore[no-untyped-call]

    @property
    def steps_itself(self) -> bool:
        """Whether the module overrides ``optimizer_step``."""
        return left_out.overridden(self.module, self._base, "optimizer_step")

    def _apply(self, *arguments: Any, **keywords: Any) -> Any:
        # A parent that is moved does not call the `to` of its parts, where Lightning's modules note
        # their device.
        moved = super()._apply(*arguments, **keywords)  # type: ignore[no-untyped-call]
        tensor = next(iter([*self.module.parameters(), *self.module.buffers()]), None)
        if tensor is not None and not tensor.is_meta:
            for part in self.modules():
                if hasattr(part, "_device") and hasattr(part, "_dtype"):
                    part._device = tensor.device
                    if tensor.is_floating_point():
                        part._dtype = tensor.dtype
        return moved

    # What loopkit asks a task for.

    def configure_model(self) -> None:
        """Prepare the data on one rank, set up the module, and have it build its layers."""
        self._data.prepare(self.module)
        for callback in self.module.configure_callbacks() or ():
            left_out.check_callbacks([callback])
            self.view.callbacks.append(callback)
        builds = any(
            left_out.overridden(self.module, self._base, name)
            for name in ("setup", "configure_model")
        )
        if builds:
            self._data.set_up("fit")
        for callback in self.view.callbacks:
            callback.setup(self.view, self.module, stage="fit")
        if builds:
            self.module.setup(stage="fit")
            self.module.configure_model()

    def loops(self) -> Mapping[str, Any]:
        """Return the loops that call the module in Lightning's order."""
        return {
            "step": LightningStep(self),
            "epoch": LightningEpoch(),
            "eval": LightningEval(),
            "predict": LightningPredict(),
        }

    def optimizers(self, run: Run) -> Any:  # type: ignore[override]
        """Return the module's optimizers: "main", or "optimizer_0" and so on if there are several.

        Raises:
            TaskError: ``configure_optimizers`` returned nothing that Lightning accepts.
        """
        self.calls.attach(run)
        manual = not self.module.automatic_optimization
        left_out.check_run(run, manual=manual)
        where = f"{type(self.module).__name__}.configure_optimizers()"
        optimizers, configs = parse_optimizers(
            self.module.configure_optimizers(), where, manual=manual
        )
        left_out.check_optimizers(optimizers, where)
        self.view.schedulers = LightningSchedulers(configs)
        self.view.strategy.wrap(optimizers, left_out.optimizer_wrapper(self._base))
        _freeze_the_rest(self.module, optimizers, where)
        if len(optimizers) == 1:
            return {"main": optimizers[0]}
        return {f"optimizer_{number}": each for number, each in enumerate(optimizers)}

    def train_data(self) -> Any:
        """Return the training loaders."""
        return self._data.training()

    def eval_data(self) -> Any:
        """Return the validation loaders; None without them, or without a ``validation_step``."""
        if not left_out.overridden(self.module, self._base, "validation_step"):
            return None
        run = self.view.run
        trains = run is None or run.loader is not None
        return self._data.evaluation("val", "fit" if trains else "validate")

    def test_data(self) -> Any:
        """Return the test loaders."""
        left_out.require(self.module, self._base, "test_step")
        return self._data.evaluation("test", "test")

    def predict_data(self) -> Any:
        """Return the loader to predict."""
        return self._data.prediction()

    def train_step(self, batch: Any) -> Tensor:
        """Return the loss of ``training_step``; for None, which skips a batch, one of 0.

        Raises:
            TaskError: it returned no loss, or skips a batch of a model that is sharded.
        """
        return self.calls.loss(batch)

    def eval_step(self, batch: Any) -> Any:
        """Return what ``validation_step`` returns."""
        return self.calls.evaluate("validation_step", batch)

    def test_step(self, batch: Any) -> Any:
        """Return what ``test_step`` returns."""
        return self.calls.evaluate("test_step", batch)

    def predict_step(self, batch: Any) -> Any:
        """Return what ``predict_step`` returns."""
        return self.calls.predict(batch)

    def on_setup(self, run: Run) -> None:
        """Give the module what a checkpoint holds; refuse what cannot be saved, before step 1."""
        self.calls.attach(run)
        if run.loader is None:
            return
        self.view.stage = self.view.log.phase = TRAIN
        if self.restored is not None:
            restore(self.calls, self.restored, run.strategy.dp)
            self.restored = None
        if run.checkpointer is not None:
            check_saveable(adapter_state(self.calls, run.strategy.dp))

    def on_fit_start(self, run: Run) -> None:
        """Emit the first events of the module."""
        self.calls.emit("on_fit_start")
        self.calls.emit("on_train_start")

    def on_epoch_start(self, run: Run) -> None:
        """Emit the start of an epoch; a resume in its middle does not start it again."""
        self.view.closing = False
        if run.progress.step_in_epoch == 0:
            self.view.batch = 0
            self.calls.emit("on_train_epoch_start")

    def on_epoch_end(self, run: Run) -> None:
        """Note that the run has counted the epoch: the module ends it after its evaluation."""
        self.view.closing = True

    def on_micro_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Emit the end of a backward pass."""
        self.calls.end_micro_step()

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Emit the end of the last batch of a step, which the run has counted."""
        self.calls.end_step()

    def _before_update(self, run: Run, grad_norm: Tensor | None) -> None:
        """Emit ``on_before_optimizer_step``: gradients are complete, unscaled and clipped."""
        optimizer = self.view.stepping or self.view.optimizers[0]
        self.calls.emit("on_before_optimizer_step", optimizer)

    def on_fit_end(self, run: Run) -> None:
        """Emit the last events of the module, and release the run."""
        self.calls.emit("on_train_end")
        self.calls.emit("on_fit_end")
        for callback in self.view.callbacks:
            callback.teardown(self.view, self.module, stage="fit")
        self._data.tear_down()
        self.view.gradients = None
        self.view.strategy.wrap([], None)

    def on_error(self, run: Run, exception: BaseException) -> None:
        """Tell callbacks and data module of an exception."""
        self._data.failed(exception)
        for callback in self.view.callbacks:
            callback.on_exception(self.view, self.module, exception)


def _freeze_the_rest(module: nn.Module, optimizers: Sequence[Any], where: str) -> None:
    """Freeze parameters that no optimizer holds, which Lightning leaves untrained as well."""
    held = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    rest = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    if not rest:
        return
    for name in rest:
        module.get_parameter(name).requires_grad_(False)
    more = f" and {len(rest) - 3} more" if len(rest) > 3 else ""
    warnings.warn(
        f"{where} gives {', '.join(rest[:3])}{more} to no optimizer: frozen, as they would never "
        "learn. Add them to an optimizer if they are to be trained",
        LoopkitWarning,
        stacklevel=2,
    )


def _rename_on_save(task: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    inner = f"{prefix}module."
    for name in [name for name in state if name.startswith(inner)]:
        state[prefix + name[len(inner) :]] = state.pop(name)


def _rename_on_load(task: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[f"{prefix}module.{name[len(prefix) :]}"] = state.pop(name)
