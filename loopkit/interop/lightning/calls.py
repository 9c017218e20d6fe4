"""ModuleCalls: the steps and events of a LightningModule, called with the arguments that they take."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from loopkit.data.micro_batches import MicroBatches
from loopkit.errors import LoopkitWarning, TaskError
from loopkit.interop.lightning.loaders import LightningData
from loopkit.interop.lightning.log import TRAIN, unmeasured
from loopkit.interop.lightning.trainer import TrainerView, accepted, arguments_of
from loopkit.nested import map_tensors
from loopkit.run import Run

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")


class ModuleCalls:
    """Calls a module and its callbacks, and counts the batches that it calls them with.

    Args:
        module: the LightningModule.
        view: its trainer.
        data: its loaders.

    Attributes:
        returned: what the last ``training_step`` returned.
        outputs: the same, detached, as ``on_train_batch_end`` gets it.
        skipped: how many batches of the present step ``training_step`` has left out.
    """

    def __init__(self, module: Any, view: TrainerView, data: LightningData) -> None:
        self.module, self.view, self.data = module, view, data
        self.returned: Any = None
        self.outputs: dict[str, Any] = {}
        self.skipped = 0
        self._has_skipped = False
        # Read once: a strategy may put wrappers around the steps.
        self._taken = {name: arguments_of(getattr(module, name)) for name in _STEPS}
        self._batches = MicroBatches()
        self._micro = -1
        self._batch: Any = None
        self._loader = 0

    def attach(self, run: Run) -> None:
        """Have the module see ``run`` as its trainer."""
        self.view.attach(run)
        self.module.trainer = self.view
        if run.strategy.sharded:
            from torch.distributed.fsdp import register_fsdp_forward_method

            # The module may be a unit of FSDP, and its steps are no calls of its forward.
            for name in _STEPS:
                if name not in vars(self.module):
                    register_fsdp_forward_method(self.module, name)

    def emit(self, hook: str, *arguments: Any) -> Any:
        """Call a hook of the callbacks and then of the module; return what the module returns."""
        module, view = self.module, self.view
        with self._named(hook):
            for callback in view.callbacks:
                if hasattr(callback, hook):
                    accepted(getattr(callback, hook), view, module, *arguments)
            return accepted(getattr(module, hook), *arguments) if hasattr(module, hook) else None

    def _step(self, name: str, *arguments: Any) -> Any:
        """Call a step of the module; return what it returns."""
        with self._named(name):
            return getattr(self.module, name)(*arguments[: self._taken[name]])

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        # By this name Lightning's `log` knows what it is called in.
        before, self.module._current_fx_name = self.module._current_fx_name, name
        try:
            yield
        finally:
            self.module._current_fx_name = before

    def start_step(self, run: Run, batches: MicroBatches) -> None:
        """Start an optimizer step."""
        self._batches, self._micro, self.skipped = batches, -1, 0
        self.view.stage = self.view.log.phase = TRAIN
        self.view.batch = run.progress.step_in_epoch * run.train_loader.accumulate
        self.view.log.start_step(run.accumulator)

    def training_step(self, batch: Any) -> None:
        """Call ``training_step`` with a batch and its number.

        Raises:
            TaskError: ``on_train_batch_start`` ends the epoch.
        """
        view = self.view
        self._micro += 1
        view.batch += bool(self._micro)
        size = view.log.batch_size = self._batches.sizes[self._micro]
        self._batch = batch = self.data.transferred(batch, 0)
        with ExitStack() as stack:
            if not size:
                stack.enter_context(unmeasured(self.module))
            elif self.emit("on_train_batch_start", batch, view.batch) == -1:
                raise TaskError(
                    "on_train_batch_start returned -1, which ends an epoch in Lightning: set "
                    "self.trainer.should_stop = True, or give fewer batches"
                )
            self.returned = self._step("training_step", batch, view.batch)
        self.outputs = _detached(self.returned)

    def loss(self, batch: Any) -> Tensor:
        """Return the loss of ``training_step``; for None, which skips a batch, one of 0.

        Raises:
            TaskError: it returned no loss, or skips a batch of a model that is sharded.
        """
        self.training_step(batch)
        out = self.returned
        if out is None:
            return self._skip_batch()
        loss = out.get("loss") if isinstance(out, Mapping) else out
        if not isinstance(loss, Tensor):
            raise TaskError(
                f"{type(self.module).__name__}.training_step returned {out!r}, with no loss: "
                "return a scalar tensor, a dict with it as 'loss', or None to skip the batch"
            )
        if not self._micro:
            self.emit("on_before_zero_grad", self.view.optimizers[0])
        self.emit("on_before_backward", loss)
        return loss

    def _skip_batch(self) -> Tensor:
        run = self.view.run
        assert run is not None
        if run.strategy.sharded:
            raise TaskError(
                f"{type(self.module).__name__}.training_step returned None, which skips a batch, and "
                f"{run.strategy.name} needs the backward pass of every rank: return the loss times 0"
            )
        if not self._has_skipped:
            warnings.warn(
                f"{type(self.module).__name__}.training_step returned None: the batch is skipped",
                LoopkitWarning,
                stacklevel=2,
            )
        self._has_skipped = True
        self.skipped += 1
        trained = [p for p in self.module.parameters() if p.requires_grad]
        return torch.stack([p.sum() * 0.0 for p in trained]).sum()

    def is_skipped(self, run: Run) -> bool:
        """Return whether a step on one rank has no batch left, so that nothing is to be updated."""
        return self.skipped == len(self._batches) and run.strategy.dp.size == 1

    def end_micro_step(self) -> None:
        """Emit the end of a backward pass, and that of a batch before the last one of a step."""
        if self.returned is not None:
            self.emit("on_after_backward")
        if self._micro < len(self._batches) - 1:
            self._end_batch()

    def end_step(self) -> None:
        """Emit the end of the last batch of a step."""
        self._end_batch()
        self.returned = self._batch = None
        self.view.log.batch_size = 1

    def _end_batch(self) -> None:
        if self._batches.sizes[self._micro]:
            self.emit("on_train_batch_end", self.outputs, self._batch, self.view.batch)

    def step_schedulers(self, run: Run, interval: str) -> None:
        """Step the schedulers of an interval, unless the module steps them itself."""
        if self.module.automatic_optimization:
            view = self.view
            index = view.batch if interval == "step" else view.current_epoch
            view.schedulers.step(interval, index, _monitored(run, view.log.values))

    def end_epoch(self, run: Run) -> None:
        """End an epoch: the event, the averages over all ranks, and the schedulers."""
        view, dp = self.view, run.strategy.dp
        view.stage = view.log.phase = TRAIN
        view.log.batch_size = 1
        self.emit("on_train_epoch_end")
        values = view.log.end_epoch(dp.all_gather_object, dp.size)
        self.step_schedulers(run, "epoch")
        if values:
            run.publish(values)
        view.closing = False

    @contextmanager
    def staged(self, run: Run, stage: str) -> Iterator[None]:
        """Inside, the trainer is in another stage, and counts batches from 0."""
        self.attach(run)
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

    def evaluate(self, name: str, batch: Any) -> Any:
        """Call ``validation_step`` or ``test_step`` with the numbers of batch and data loader."""
        batch = self.data.transferred(batch, self._loader)
        return self._step(name, batch, self.view.batch, self._loader)

    def predict(self, batch: Any) -> Any:
        """Call ``predict_step`` and the events around it."""
        index, self.view.batch = self.view.batch, self.view.batch + 1
        batch = self.data.transferred(batch, 0)
        self.emit("on_predict_batch_start", batch, index, 0)
        made = self._step("predict_step", batch, index, 0)
        self.emit("on_predict_batch_end", made, batch, index, 0)
        return made


def _detached(out: Any) -> dict[str, Any]:
    """Return the output of a step as Lightning gives it to ``on_train_batch_end``."""
    if not isinstance(out, Mapping):
        out = {} if out is None else {"loss": out}
    return map_tensors(Tensor.detach, dict(out))  # type: ignore[no-any-return]


def _monitored(run: Run, values: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
    """Return a function that gives a logged value of rank 0, so that all ranks decide alike."""

    def value(name: str) -> Tensor | None:
        found = values.get(name)
        if found is None or run.strategy.dp.size == 1:
            return found
        return torch.tensor(run.strategy.dp.broadcast_object(float(found)))

    return value
