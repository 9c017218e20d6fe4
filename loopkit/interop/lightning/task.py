"""LightningTask: an unmodified LightningModule, with its data module and callbacks, as a task."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import LoopkitWarning, TaskError
from loopkit.interop.lightning import checks
from loopkit.interop.lightning.loaders import LightningData
from loopkit.interop.lightning.log import TRAIN, unmeasured
from loopkit.interop.lightning.loops import (
    LightningEpoch,
    LightningEval,
    LightningPredict,
    LightningStep,
)
from loopkit.interop.lightning.optimizers import LightningSchedulers, parse_optimizers
from loopkit.interop.lightning.trainer import TrainerView, accepted, arguments_of
from loopkit.keywords import checks_keywords
from loopkit.nested import map_tensors
from loopkit.run import Run
from loopkit.task import Task

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


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
        train_dataloaders, val_dataloaders, test_dataloaders, predict_dataloaders: loaders, as
            ``Trainer.fit`` takes them; each wins over that of the data module.
        callbacks: Lightning's callbacks, whose events are called with those of the module.

    Attributes:
        module: the module itself. ``state_dict`` has its parameters under the module's own names.
        view: what the module sees as its trainer.
        outputs: what the last ``training_step`` returned, detached.
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
        self._base = checks.check_module(module)
        checks.check_callbacks(callbacks)
        self.module = module
        self.view = TrainerView(module, datamodule, list(callbacks))
        given = (train_dataloaders, val_dataloaders, test_dataloaders, predict_dataloaders)
        self._data = LightningData(self.view, self._base, given)
        # Read once: a strategy may put wrappers around the steps.
        self._taken = {name: arguments_of(getattr(module, name)) for name in _STEPS}
        self.outputs: dict[str, Any] = {}
        self.restored: Mapping[str, Any] | None = None
        self._batches: MicroBatches | None = None
        self._micro = -1
        module.trainer = self.view
        if datamodule is not None:
            datamodule.trainer = self.view
        # Listened to only where it is used: it needs the norm of the gradients in every step.
        names = ("on_before_optimizer_step", "configure_callbacks")
        if callbacks or any(checks.overridden(module, self._base, name) for name in names):
            self.on_before_update = self._before_update
        self.register_state_dict_post_hook(_rename_on_save)
        self.register_load_state_dict_pre_hook(_rename_on_load)

    @property
    def steps_itself(self) -> bool:
        """Whether the module overrides ``optimizer_step``."""
        return checks.overridden(self.module, self._base, "optimizer_step")

    def _apply(self, *arguments: Any, **keywords: Any) -> Any:
        # A parent that is moved does not call the `to` of its parts, where Lightning's modules note
        # their device.
        moved = super()._apply(*arguments, **keywords)
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
            checks.check_callbacks([callback])
            self.view.callbacks.append(callback)
        builds = any(
            checks.overridden(self.module, self._base, name)
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

    def optimizers(self, run: Run) -> Any:
        """Return the module's optimizers: "main", or "optimizer_0" and so on if there are several.

        Raises:
            TaskError: ``configure_optimizers`` returned nothing that Lightning accepts.
        """
        self._attach(run)
        manual = not self.module.automatic_optimization
        checks.check_run(run, manual=manual)
        where = f"{type(self.module).__name__}.configure_optimizers()"
        optimizers, configs = parse_optimizers(
            self.module.configure_optimizers(), where, manual=manual
        )
        self.view.schedulers = LightningSchedulers(configs)
        self.view.strategy.wrap(optimizers, checks.optimizer_wrapper(self._base))
        _freeze_the_rest(self.module, optimizers, where)
        if len(optimizers) == 1:
            return {"main": optimizers[0]}
        return {f"optimizer_{number}": each for number, each in enumerate(optimizers)}

    def train_data(self) -> Any:
        """Return the training loaders."""
        return self._data.training()

    def eval_data(self) -> Any:
        """Return the validation loaders; None without them, or without a ``validation_step``."""
        if not checks.overridden(self.module, self._base, "validation_step"):
            return None
        return self._data.evaluation("val", "fit" if self.view.run else "validate")

    def test_data(self) -> Any:
        """Return the test loaders."""
        checks.require(self.module, self._base, "test_step")
        return self._data.evaluation("test", "test")

    def predict_data(self) -> Any:
        """Return the loader to predict."""
        return self._data.prediction()

    def train_step(self, batch: Any) -> Tensor:
        """Return the loss of ``training_step``.

        Raises:
            TaskError: it returned none.
        """
        self.training_step(batch)
        out = self._raw
        loss = out.get("loss") if isinstance(out, Mapping) else out
        self._raw = None
        if not isinstance(loss, Tensor):
            raise TaskError(
                f"{type(self.module).__name__}.training_step returned {out!r}, with no loss: "
                "return a scalar tensor, or a dict with it as 'loss'. A batch cannot be left out "
                "by returning None: return the loss times 0"
            )
        return loss

    def training_step(self, batch: Any) -> None:
        """Call ``training_step`` of the module with the batch and its number."""
        assert self._batches is not None
        view, batches = self.view, self._batches
        self._micro += 1
        view.batch += bool(self._micro)
        size = batches.sizes[self._micro]
        view.log.batch_size = size
        batch = self._data.transferred(batch, 0)
        self._current = batch
        with ExitStack() as stack:
            if not size:
                stack.enter_context(unmeasured(self.module))
            elif self.emit("on_train_batch_start", batch, view.batch) == -1:
                raise TaskError(
                    "on_train_batch_start returned -1, which ends an epoch in Lightning: set "
                    "self.trainer.should_stop = True, or give fewer batches"
                )
            self._raw = self._step("training_step", batch, view.batch)
        self.outputs = _detached(self._raw)

    def eval_step(self, batch: Any) -> Any:
        """Return what ``validation_step`` returns."""
        return self._evaluated("validation_step", batch)

    def test_step(self, batch: Any) -> Any:
        """Return what ``test_step`` returns."""
        return self._evaluated("test_step", batch)

    def predict_step(self, batch: Any) -> Any:
        """Return what ``predict_step`` returns."""
        view = self.view
        index, view.batch = view.batch, view.batch + 1
        batch = self._data.transferred(batch, 0)
        self.emit("on_predict_batch_start", batch, index, 0)
        made = self._step("predict_step", batch, index, 0)
        self.emit("on_predict_batch_end", made, batch, index, 0)
        return made

    def _evaluated(self, name: str, batch: Any) -> Any:
        number = self._loader
        return self._step(name, self._data.transferred(batch, number), self.view.batch, number)

    _loader = 0
    _current: Any = None
    _raw: Any = None

    # What the loops ask for.

    def emit(self, hook: str, *arguments: Any) -> Any:
        """Call a hook of the callbacks and then of the module; return what the module returns."""
        module, view = self.module, self.view
        before, module._current_fx_name = module._current_fx_name, hook
        try:
            for callback in view.callbacks:
                if hasattr(callback, hook):
                    accepted(getattr(callback, hook), view, module, *arguments)
            return accepted(getattr(module, hook), *arguments) if hasattr(module, hook) else None
        finally:
            module._current_fx_name = before

    def _step(self, name: str, *arguments: Any) -> Any:
        module = self.module
        before, module._current_fx_name = module._current_fx_name, name
        try:
            return getattr(module, name)(*arguments[: self._taken[name]])
        finally:
            module._current_fx_name = before

    @contextmanager
    def staged(self, run: Run, stage: str) -> Iterator[None]:
        """Inside, the trainer is in another stage, and counts batches from 0."""
        self._attach(run)
        view = self.view
        before = view.stage, view.log.phase, view.batch, view.log.batch_size
        view.stage, view.log.phase, view.batch, view.log.batch_size = stage, stage, 0, 1
        try:
            yield
        finally:
            view.stage, view.log.phase, view.batch, view.log.batch_size = before

    def start_loader(self, number: int, count: int) -> None:
        """Start data loader ``number`` of ``count``."""
        self._loader = number
        self.view.log.suffix = f"/dataloader_idx_{number}" if count > 1 else ""
        self.view.log.batch_size = 1

    def start_batch(self, stack: ExitStack, index: int, size: int) -> None:
        """Start batch ``index``; of a dummy batch, nothing is kept."""
        self.view.batch, self.view.log.batch_size = index, size
        if not size:
            stack.enter_context(unmeasured(self.module))

    def start_step(self, run: Run, batches: MicroBatches) -> None:
        """Start an optimizer step."""
        self._batches, self._micro = batches, -1
        self.view.stage = self.view.log.phase = TRAIN
        self.view.batch = run.progress.step_in_epoch * run.train_loader.accumulate
        self.view.log.start_step(run.accumulator)

    def finish_step(self, run: Run) -> None:
        """Step the schedulers that count steps."""
        view = self.view
        if self.module.automatic_optimization:
            view.schedulers.step("step", view.batch, self._monitored(run))

    def end_epoch(self, run: Run) -> None:
        """End an epoch: the event, the averages over all ranks, and the schedulers."""
        view, dp = self.view, run.strategy.dp
        view.stage = view.log.phase = TRAIN
        view.log.batch_size = 1
        self.emit("on_train_epoch_end")
        values = view.log.end_epoch(dp.all_gather_object, dp.size)
        if self.module.automatic_optimization:
            view.schedulers.step("epoch", view.current_epoch, self._monitored(run))
        if values:
            run.publish(values)
        view.closing = False

    def _monitored(self, run: Run) -> Any:
        def value(name: str) -> Any:
            found = self.view.log.values.get(name)
            if found is None or run.strategy.dp.size == 1:
                return found
            return torch.tensor(run.strategy.dp.broadcast_object(float(found)))

        return value

    def adapter_state(self) -> dict[str, Any]:
        """Return everything to resume that is in no module. Collective."""
        view = self.view
        dp = view.run.strategy.dp  # type: ignore[union-attr]
        saved = self._checkpoint()
        given = set(saved)
        self.module.on_save_checkpoint(saved)
        callbacks: dict[str, Any] = {}
        for number, callback in enumerate(view.callbacks):
            callback.on_save_checkpoint(view, self.module, saved)
            callbacks[f"{number} {type(callback).__name__}"] = callback.state_dict()
        return {
            "log": view.log.state_dict(dp.all_gather_object),
            "schedulers": view.schedulers.state_dict(),
            "optimizer_steps": view.optimizer_steps,
            "module": {key: value for key, value in saved.items() if key not in given},
            "callbacks": callbacks,
            "datamodule": self._data.state_dict(),
            "gradients": checks.gradients_of(self.module, dp),
        }

    def _checkpoint(self) -> dict[str, Any]:
        """Return what save and load hooks find in a checkpoint."""
        return {
            "epoch": self.view.current_epoch,
            "global_step": self.view.global_step,
            "state_dict": self.module.state_dict(),
        }

    def _restore(self, run: Run, state: Mapping[str, Any]) -> None:
        view, dp = self.view, run.strategy.dp
        view.log.load_state_dict(state["log"], dp.rank, dp.size)
        view.schedulers.load_state_dict(state["schedulers"])
        view.optimizer_steps = state["optimizer_steps"]
        self._data.load_state_dict(state["datamodule"])
        checkpoint = {**self._checkpoint(), **state["module"]}
        self.module.on_load_checkpoint(checkpoint)
        for number, callback in enumerate(view.callbacks):
            callback.on_load_checkpoint(view, self.module, checkpoint)
            kept = state["callbacks"].get(f"{number} {type(callback).__name__}")
            if kept:
                callback.load_state_dict(kept)
        checks.load_gradients(self.module, state["gradients"], dp)

    def _attach(self, run: Run) -> None:
        self.view.attach(run)
        self.module.trainer = self.view
        if run.strategy.sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            # The module may be a unit of FSDP, and its steps are no calls of its forward.
            for name in _STEPS:
                if hasattr(self.module, name) and name not in vars(self.module):
                    register_fsdp_forward_method(self.module, name)

    # Events of the run.

    def on_setup(self, run: Run) -> None:
        """Give the module what a checkpoint holds; refuse what cannot be saved, before step 1."""
        self._attach(run)
        if run.loader is None:
            return
        self.view.stage = self.view.log.phase = TRAIN
        if self.restored is not None:
            self._restore(run, self.restored)
            self.restored = None
        if run.checkpointer is not None:
            checks.check_saveable(self.adapter_state())

    def on_fit_start(self, run: Run) -> None:
        """Emit the first events of the module."""
        self.emit("on_fit_start")
        self.emit("on_train_start")

    def on_epoch_start(self, run: Run) -> None:
        """Emit the start of an epoch; a resume in its middle does not start it again."""
        self.view.closing = False
        if run.progress.step_in_epoch == 0:
            self.view.batch = 0
            self.emit("on_train_epoch_start")

    def on_epoch_end(self, run: Run) -> None:
        """Note that the run has counted the epoch: the module ends it after its evaluation."""
        self.view.closing = True

    def on_micro_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Emit the end of a backward pass, and that of a batch before the last one of a step."""
        assert self._batches is not None
        self.emit("on_after_backward")
        if self._micro < len(self._batches) - 1 and self._batches.sizes[self._micro]:
            self.emit("on_train_batch_end", self.outputs, self._current, self.view.batch)

    def on_step_end(self, run: Run, out: Mapping[str, Any]) -> None:
        """Emit the end of the last batch of a step, which the run has counted."""
        assert self._batches is not None
        if self._batches.sizes[-1]:
            self.emit("on_train_batch_end", self.outputs, self._current, self.view.batch)
        self._batches = self._current = None
        self.view.log.batch_size = 1

    def _before_update(self, run: Run, grad_norm: Tensor | None) -> None:
        """Emit ``on_before_optimizer_step``: gradients are complete, unscaled and clipped."""
        self.emit("on_before_optimizer_step", self.view.stepping or self.view.optimizers[0])

    def on_fit_end(self, run: Run) -> None:
        """Emit the last events of the module, and take it apart."""
        self.emit("on_train_end")
        self.emit("on_fit_end")
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


def _detached(out: Any) -> dict[str, Any]:
    """Return the output of a step as Lightning gives it to ``on_train_batch_end``."""
    if not isinstance(out, Mapping):
        out = {} if out is None else {"loss": out}
    return map_tensors(Tensor.detach, dict(out))  # type: ignore[no-any-return]


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
