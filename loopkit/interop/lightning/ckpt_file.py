"""A ``.ckpt`` file of Lightning, for ``trainer.save_checkpoint`` inside a module or a callback."""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from loopkit.errors import TaskError
from loopkit.interop.lightning.left_out import lightning_package

if TYPE_CHECKING:
    from loopkit.interop.lightning.trainer import TrainerView


def save_ckpt(view: TrainerView, path: str | os.PathLike[str]) -> None:
    """Write the weights and the arguments of a module; ``load_from_checkpoint`` opens the file.

    A run resumes from its own checkpoints, and not from this file.

    Raises:
        TaskError: the weights are sharded over the ranks.
    """
    run, module = view.run, view.lightning_module
    if run is not None and run.strategy.sharded:
        raise TaskError(
            f"trainer.save_checkpoint writes whole weights, and {run.strategy.name} shards them: "
            "export a checkpoint of the run, by `loopkit ckpt export`"
        )
    package = import_module(lightning_package(module))
    saved: dict[str, Any] = {
        "epoch": view.current_epoch,
        "global_step": view.global_step,
        "pytorch-lightning_version": package.__version__,
        "state_dict": module.state_dict(),
    }
    for owner in (module, view.datamodule):
        if owner is not None and owner.hparams:
            saved[owner.CHECKPOINT_HYPER_PARAMS_NAME] = owner._hparams_name
            saved[owner.CHECKPOINT_HYPER_PARAMS_KEY] = dict(owner.hparams)
    module.on_save_checkpoint(saved)
    if view.is_global_zero:
        import_module(f"{package.__name__}.plugins.io").TorchCheckpointIO().save_checkpoint(
            saved, path
        )
