"""What a LightningTask does not run, said by name before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from loopkit.errors import OptionError, TaskError
from loopkit.run import Run

# Methods that a LightningTask never calls, with what to do instead.
_LEFT_OUT = {
    "training_epoch_end": "Lightning 2 has on_train_epoch_end(self); keep the outputs on self",
    "validation_epoch_end": "Lightning 2 has on_validation_epoch_end(self); keep the outputs on self",
    "test_epoch_end": "Lightning 2 has on_test_epoch_end(self); keep the outputs on self",
    "training_step_end": "Lightning 2 has no such method: do it in training_step",
    "validation_step_end": "Lightning 2 has no such method: do it in validation_step",
    "backward": "use manual optimization, with self.manual_backward",
    "lr_scheduler_step": "give the scheduler a step() of its own, or use manual optimization",
    "optimizer_zero_grad": "gradients are cleared after each update",
    "configure_gradient_clipping": "pass Fit(clip_norm=) or Fit(clip_value=)",
    "configure_sharded_model": "Lightning 2 has configure_model",
    "transfer_batch_to_device": "a batch that has a method .to is moved by it",
    "on_before_batch_transfer": "do it in the data set, or in on_after_batch_transfer",
    **dict.fromkeys(
        (
            "on_validation_model_eval",
            "on_validation_model_train",
            "on_validation_model_zero_grad",
            "on_test_model_eval",
            "on_test_model_train",
            "on_predict_model_eval",
        ),
        "evaluation puts the module into eval mode, and back: switch parts of it in "
        "on_validation_start, on_test_start or on_predict_start",
    ),
}
_DATA_LEFT_OUT = ("transfer_batch_to_device", "on_before_batch_transfer")
_ARGUMENTS = {
    "optimizer_idx": "Lightning 2 has manual optimization for several optimizers",
    "hiddens": "Lightning 2 has no truncated backpropagation",
    "dataloader_iter": "take batch and batch_idx",
}
# Callbacks that reach into Lightning's own loops, with what to do instead.
CALLBACKS = {
    "ModelCheckpoint": "pass Fit(checkpoint=Checkpoint(best='val_loss:min'))",
    "OnExceptionCheckpoint": "loopkit saves at every end of a run",
    "EarlyStopping": "pass Fit(hooks=[EarlyStop('val_loss:min')])",
    "LearningRateMonitor": "learning rates are logged as lr; leave it out",
    "StochasticWeightAveraging": "pass Fit(hooks=[SWA()])",
    "WeightAveraging": "pass Fit(hooks=[EMA()])",
    "EMAWeightAveraging": "pass Fit(hooks=[EMA()])",
    "GradientAccumulationScheduler": "pass Fit(accumulate=)",
    "BaseFinetuning": "pass Fit(hooks=[Unfreeze(...)])",
    "BackboneFinetuning": "pass Fit(hooks=[Unfreeze(...)])",
    "ProgressBar": "pass Fit(progress=)",
    "TQDMProgressBar": "pass Fit(progress=)",
    "RichProgressBar": "pass Fit(progress=)",
    "ModelSummary": "pass Fit(hooks=[ModelSummary()])",
    "RichModelSummary": "pass Fit(hooks=[ModelSummary()])",
    "DeviceStatsMonitor": "pass Fit(hooks=[Throughput()])",
    "ThroughputMonitor": "pass Fit(hooks=[Throughput()])",
    "Timer": "pass Fit(time=)",
    "ModelPruning": "prune in on_train_epoch_end",
    "BatchSizeFinder": "pass Fit(micro_batch='auto')",
    "LearningRateFinder": "pass Fit(hooks=[FindLR()])",
    "SpikeDetection": "pass Fit(on_nan='skip'), or compare losses in on_train_batch_end",
    "BasePredictionWriter": "pass Fit.predict(task, writer=)",
}


def lightning_module(module: Any) -> type | None:
    """Return Lightning's own LightningModule below the class of ``module``; None without one."""
    for kind in type(module).__mro__:
        package = kind.__module__.partition(".")[0]
        if kind.__name__ == "LightningModule" and package in ("lightning", "pytorch_lightning"):
            return kind
    return None


def check_module(module: Any) -> type:
    """Return Lightning's own LightningModule below the class of ``module``.

    Raises:
        TaskError: there is none, or the module uses what a LightningTask has not.
    """
    base = lightning_module(module)
    if base is None:
        raise TaskError(
            f"LightningTask got {module!r:.80}, which is no LightningModule of lightning or "
            "pytorch_lightning: give the module itself, an instance"
        )
    name = type(module).__name__
    for method, instead in _LEFT_OUT.items():
        if overridden(module, base, method):
            raise TaskError(f"{name}.{method} is never called by a LightningTask: {instead}")
    require(module, base, "training_step")
    for argument in inspect.signature(module.training_step).parameters:
        if argument in _ARGUMENTS:
            raise TaskError(
                f"{name}.training_step takes {argument}, which a LightningTask does not give: "
                f"{_ARGUMENTS[argument]}"
            )
    return base


def overridden(module: Any, base: type, method: str) -> bool:
    """Return whether a module defines a method itself, in its class or as an attribute."""
    own = getattr(type(module), method, None)
    return method in vars(module) or (own is not None and own is not getattr(base, method, None))


def require(module: Any, base: type, method: str) -> None:
    """Check that a module defines a method.

    Raises:
        TaskError: it does not.
    """
    if not overridden(module, base, method):
        raise TaskError(f"{type(module).__name__} has no {method}: define it")


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Refuse callbacks that need Lightning's own loops.

    Raises:
        TaskError: with loopkit's way.
    """
    for callback in callbacks:
        for kind in type(callback).__mro__:
            if kind.__name__ in CALLBACKS and kind.__module__.partition(".")[0] != "__main__":
                raise TaskError(
                    f"{type(callback).__name__} works inside Lightning's own loops: "
                    f"{CALLBACKS[kind.__name__]}"
                )


def check_datamodule(data: Any) -> None:
    """Refuse a data module with methods that a LightningTask never calls.

    Raises:
        TaskError: naming the method.
    """
    base = next((k for k in type(data).__mro__ if k.__name__ == "LightningDataModule"), type(data))
    for method in _DATA_LEFT_OUT:
        if data is not None and overridden(data, base, method):
            raise TaskError(
                f"{type(data).__name__}.{method} is never called by a LightningTask: {_LEFT_OUT[method]}"
            )


def check_optimizers(optimizers: Sequence[Any], where: str) -> None:
    """Refuse optimizers that compute gradients inside their step, as LBFGS does.

    Raises:
        TaskError: naming the optimizer.
    """
    for optimizer in optimizers:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise TaskError(
                f"{where} returned {type(optimizer).__name__}, which computes gradients several times "
                "in one step: write a Task whose loops() return {'step': ClosureStep()}"
            )


def check_run(run: Run, *, manual: bool) -> None:
    """Refuse options of a run that a LightningModule cannot be trained with.

    Raises:
        OptionError: naming the option.
    """
    for name in ("step", "epoch", "eval", "predict"):
        if getattr(run.options, name) is not None:
            raise OptionError(
                f"Fit({name}=) replaces the loop that calls a LightningModule in Lightning's order: "
                "leave it out"
            )
    if not run.strategy.exposes_gradients:
        raise OptionError(
            f"a LightningTask trains by DDP and FSDP, and {run.strategy.name} replaces the module's "
            "optimizers: take strategy='ddp' or 'fsdp'"
        )
    if not manual:
        return
    if run.train_loader.accumulate > 1:
        raise OptionError(
            "in manual optimization the module itself says when it updates: leave accumulate and "
            "global_batch_size out"
        )
    if run.strategy.sharded:
        raise OptionError(
            f"in manual optimization one call of training_step makes several backward passes, and "
            f"{run.strategy.name} shards parameters around one: take strategy='ddp'"
        )


def optimizer_wrapper(base: type) -> Any:
    """Return the LightningOptimizer of the package that a module is made with."""
    return import_module(f"{_package(base)}.core.optimizer").LightningOptimizer


def lightning_package(module: Any) -> str:
    """Return the package of a module's LightningModule, "lightning.pytorch" or "pytorch_lightning"."""
    return _package(lightning_module(module) or object)


def _package(base: type) -> str:
    package = base.__module__.rpartition(".core")[0]
    return package if package == "pytorch_lightning" else "lightning.pytorch"
