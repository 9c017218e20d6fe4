"""The data of a LightningTask: loaders of the module, of its data module, or given by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loopkit.data import CombinedLoader
from loopkit.distributed.rank_zero import rank_zero_first
from loopkit.errors import TaskError
from loopkit.interop.lightning.left_out import overridden

if TYPE_CHECKING:
    from loopkit.interop.lightning.trainer import TrainerView

_KINDS = ("train", "val", "test", "predict")


class LightningData:
    """Loaders by kind, prepared once on each machine and set up for the stage that asks for them.

    Args:
        view: the trainer of the module, which has the data module.
        base: Lightning's own LightningModule.
        given: the loaders that the user gave, for training, validation, test and prediction.
    """

    def __init__(self, view: TrainerView, base: type, given: tuple[Any, ...]) -> None:
        self._view = view
        self._base = base
        self._given = dict(zip(_KINDS, given))
        self._stages: set[str] = set()
        self._prepared = False

    def prepare(self, module: Any) -> None:
        """Call ``prepare_data`` on one rank of each machine; the others wait for it."""
        if self._prepared:
            return
        self._prepared = True
        for owner in (self._view.datamodule, module):
            if owner is None:
                continue
            with rank_zero_first(local=getattr(owner, "prepare_data_per_node", True)):
                if self._prepares(owner):
                    owner.prepare_data()

    def _prepares(self, owner: Any) -> bool:
        per_node = getattr(owner, "prepare_data_per_node", True)
        return bool(self._view.local_rank == 0 if per_node else self._view.global_rank == 0)

    def set_up(self, stage: str) -> None:
        """Call ``setup`` of the data module, once for each stage."""
        self.prepare(self._view.lightning_module)
        data = self._view.datamodule
        if data is not None and stage not in self._stages:
            self._stages.add(stage)
            data.setup(stage=stage)

    def tear_down(self) -> None:
        """Call ``teardown`` of the module and the data module for each stage that was set up."""
        for stage in sorted(self._stages | {"fit"}):
            for owner in (self._view.lightning_module, self._view.datamodule):
                if owner is not None and (
                    owner is not self._view.datamodule or stage in self._stages
                ):
                    owner.teardown(stage=stage)
        self._stages.clear()

    def failed(self, exception: BaseException) -> None:
        """Tell the data module of an exception."""
        on_exception = getattr(self._view.datamodule, "on_exception", None)
        if on_exception is not None:
            on_exception(exception)

    def training(self) -> Any:
        """Return the training loader, or several side by side.

        Raises:
            TaskError: there is none.
        """
        loaders = self._loaders("train", "fit")
        if loaders is None:
            raise TaskError(
                f"{type(self._view.lightning_module).__name__} has no train_dataloader: define it, "
                "or give LightningTask a datamodule or train_dataloaders="
            )
        self._view.train_dataloader = loaders
        return loaders

    def evaluation(self, kind: str, stage: str) -> Any:
        """Return the loaders of a validation ("val") or a test, in order; None without any."""
        loaders = self._loaders(kind, stage)
        setattr(self._view, f"{kind}_dataloaders", loaders)
        if isinstance(loaders, CombinedLoader):
            loaders = loaders.iterables
        if isinstance(loaders, (list, tuple)):
            return {str(number): each for number, each in enumerate(loaders)} or None
        return loaders

    def prediction(self) -> Any:
        """Return the loader to predict.

        Raises:
            TaskError: there are several.
        """
        loaders = self._loaders("predict", "predict")
        if isinstance(loaders, (list, tuple, Mapping, CombinedLoader)):
            raise TaskError(
                "predict_dataloader returned several loaders: predict one at a time, by "
                "Fit.predict(task, data=loader)"
            )
        self._view.predict_dataloaders = loaders
        return loaders

    def _loaders(self, kind: str, stage: str) -> Any:
        if self._given[kind] is not None:
            return _converted(self._given[kind])
        self.set_up(stage)
        name, view = f"{kind}_dataloader", self._view
        if view.datamodule is not None and _defines(view.datamodule, name):
            return _converted(getattr(view.datamodule, name)())
        if overridden(view.lightning_module, self._base, name):
            return _converted(getattr(view.lightning_module, name)())
        return None

    def transferred(self, batch: Any, number: int) -> Any:
        """Return a batch after ``on_after_batch_transfer`` of data module or module."""
        view = self._view
        for owner in (view.datamodule, view.lightning_module):
            if owner is not None and _defines(owner, "on_after_batch_transfer"):
                return owner.on_after_batch_transfer(batch, number)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the data module."""
        data = self._view.datamodule
        return {} if data is None else dict(data.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Give the data module its state."""
        if state:
            self._view.datamodule.load_state_dict(dict(state))


def _defines(owner: Any, name: str) -> bool:
    """Return whether a user's class, or the object itself, defines a method of Lightning's classes."""
    if name in vars(owner):
        return True
    home = next((kind for kind in type(owner).__mro__ if name in vars(kind)), object)
    return home is not object and home.__module__.partition(".")[0] not in (
        "lightning",
        "pytorch_lightning",
    )


def _converted(loaders: Any) -> Any:
    """Return Lightning's CombinedLoader as loopkit's, and anything else as it is."""
    if type(loaders).__name__ == "CombinedLoader" and not isinstance(loaders, CombinedLoader):
        return CombinedLoader(loaders.iterables, loaders._mode)
    return loaders
