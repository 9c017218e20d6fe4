"""The loops of a LightningTask: they call the module's steps and events in Lightning's order."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from loopkit.data.micro_batches import MicroBatches
from loopkit.data.sources import Source
from loopkit.interop.lightning.resume_state import adapter_state
from loopkit.loops import EpochLoop, EvalLoop, PredictLoop, StepLoop
from loopkit.loops.evaluate import evaluation_mode, seeded_batches
from loopkit.rng import at_step
from loopkit.run import Run
from loopkit.task import eval_step_of, measured_set

if TYPE_CHECKING:
    from loopkit.interop.lightning.module_task import LightningTask


class LightningStep(StepLoop):
    """One optimizer step of a LightningModule; in manual optimization, one call of training_step.

    Its state is that of the module's schedulers, of what it logged, and of its save hooks.
    """

    def __init__(self, task: LightningTask) -> None:
        self.task = task

    def run(self, run: Run, batches: MicroBatches) -> Mapping[str, Any]:
        """Do one optimizer step over ``batches``.

        Returns:
            The values that the last call of ``training_step`` returned.
        """
        task, view = self.task, self.task.view
        task.calls.start_step(run, batches)
        if not task.module.automatic_optimization:
            self._by_hand(run, batches)
        elif task.steps_itself:
            gradients = ManualGradients(self, run, None)
            view.gradients = gradients

            def closure() -> Any:
                self.backward(run, batches, log=False)
                return task.calls.outputs

            (wrapped,) = view.strategy._lightning_optimizers
            task.module.optimizer_step(view.current_epoch, view.batch, wrapped, closure)
        else:
            self.backward(run, batches, log=False)
            if task.calls.is_skipped(run):
                task.zero_grad()  # torch's optimizers leave parameters without a gradient alone
            else:
                self.update(run)
        task.calls.step_schedulers(run, "step")
        return task.calls.outputs

    def _by_hand(self, run: Run, batches: MicroBatches) -> None:
        strategy, task, timings = run.strategy, self.task, run.record.timings
        began, updated = perf_counter(), timings.update
        task.view.gradients = ManualGradients(self, run, batches)
        if run.seed is not None:
            strategy.set_seed(at_step(run.seed, run.progress.step, strategy.dp.rank))
        if strategy.dp.size > 1:
            for buffer in task.module.buffers():
                dist.broadcast(buffer, 0)
        # Not through DistributedDataParallel: it expects one backward pass after each forward pass.
        with strategy.forward_context or nullcontext():
            task.calls.training_step(batches[0])
        timings.compute += perf_counter() - began - (timings.update - updated)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the task that is no tensor of a module. Collective."""
        run = self.task.view.run
        assert run is not None
        return adapter_state(self.task.calls, run.strategy.dp)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the state for the set-up of the run, which gives it to the module."""
        self.task.restored = state


class ManualGradients:
    """Backward passes and updates that a module asks for itself, over all ranks.

    The gradient of an update is that of one big batch: losses are weighted by the samples of each
    rank, and gradients are summed over the ranks when the update is made. Several backward passes
    may come before it.

    Args:
        step: makes the updates.
        run: the run.
        batches: the batch at hand; None where the step itself has computed the gradients.
    """

    def __init__(self, step: StepLoop, run: Run, batches: MicroBatches | None) -> None:
        self._step = step
        self._run = run
        self._share: float | None = None
        self._reduced: set[int] = set()
        self._by_hand = batches is not None
        ranks = run.strategy.dp.size
        if batches is not None and ranks > 1:
            self._share = batches.sizes[0] * ranks / max(batches.total, 1)

    def backward(self, loss: Tensor, **options: Any) -> None:
        """Add the gradients of a loss; ``options`` are those of ``Tensor.backward``."""
        self._reduced.clear()
        task: Any = self._run.task
        task.calls.emit("on_before_backward", loss)
        if self._share is not None:
            loss = loss * self._share
        if options:
            loss.backward(**options)  # type: ignore[no-untyped-call]
        else:
            self._run.strategy.backward(loss)

    def reduce(self, optimizer: Optimizer) -> None:
        """Average the gradients of one optimizer over the ranks, once for each update.

        A parameter that has a gradient on some ranks alone counts as zero on the others.
        """
        if not self._by_hand or self._run.strategy.dp.size == 1 or id(optimizer) in self._reduced:
            return
        self._reduced.add(id(optimizer))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        present = torch.tensor([float(p.grad is not None) for p in parameters])
        dist.all_reduce(present := present.to(self._run.strategy.device))
        for parameter, count in zip(parameters, present.tolist()):
            if count:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(grad)
                parameter.grad = grad.div_(self._run.strategy.dp.size)

    def step(self, optimizer: Optimizer, **options: Any) -> None:
        """Update the parameters of one optimizer."""
        run = self._run
        self.reduce(optimizer)
        name = next(name for name, each in run.optimizers.items() if each is optimizer)
        task: Any = run.task
        if not self._by_hand and task.calls.is_skipped(run):
            task.zero_grad()
            return
        task.view.stepping = optimizer
        self._step.update(run, [name])
        task.view.optimizer_steps += 1


class LightningEpoch(EpochLoop):
    """One pass over the data; ``on_train_epoch_end`` comes after the evaluation."""

    def after_epoch(self, run: Run) -> None:
        """End the epoch of the module: its last event, its averages, and its schedulers."""
        super().after_epoch(run)
        task: Any = run.task
        task.calls.end_epoch(run)


class LightningEval(EvalLoop):
    """One evaluation by ``validation_step`` or ``test_step``, over one or several data loaders."""

    def run(self, run: Run, data: Mapping[str, Source]) -> dict[str, float]:
        """Evaluate on each data set.

        Returns:
            What the module logged, by its own names, and the time that it took.
        """
        task: Any = run.task
        kind = task.eval_set or "eval"
        stage = "test" if kind == "test" else "validation"
        if run.events.eval_start is not None:
            run.events.eval_start(run)
        began, samples, dp = perf_counter(), 0.0, run.strategy.dp
        with evaluation_mode(run), task.calls.staged(run, stage):
            task.calls.emit(f"on_{stage}_start")
            task.calls.emit(f"on_{stage}_epoch_start")
            for number, (name, source) in enumerate(data.items()):
                task.calls.start_loader(number, len(data))
                with measured_set(task, f"{kind}/{name}" if name else kind):
                    samples += self._measure(run, source, stage, number)
            task.calls.start_loader(0, 1)
            task.calls.emit(f"on_{stage}_epoch_end")
            metrics = task.view.log.end_epoch(dp.all_gather_object, dp.size)
            task.calls.emit(f"on_{stage}_end")
        seconds = perf_counter() - began
        (samples,) = dp.all_reduce_sum(samples)
        metrics |= {f"{kind}/runtime": seconds, f"{kind}/samples_per_second": samples / seconds}
        return dp.broadcast_object(metrics)

    def _measure(self, run: Run, source: Source, stage: str, number: int) -> int:
        strategy, task = run.strategy, run.task
        step_fn, step_end = strategy.step_fn(eval_step_of(task)), run.events.eval_step_end
        samples = 0
        calls: Any = vars(task)["calls"]
        for index, (batch, size) in enumerate(seeded_batches(run, source, stream=3)):
            if not size and not strategy.collective_forward:
                continue
            with ExitStack() as stack:
                calls.start_batch(stack, index, size)
                if size:
                    calls.emit(f"on_{stage}_batch_start", batch, index, number)
                with strategy.forward_context or nullcontext():
                    outputs = step_fn(batch)
                if size:
                    calls.emit(f"on_{stage}_batch_end", outputs, batch, index, number)
            samples += size
            if size and step_end is not None:
                step_end(run, outputs if isinstance(outputs, Mapping) else {"outputs": outputs})
        return samples


class LightningPredict(PredictLoop):
    """One pass of predictions by ``predict_step``."""

    def run(self, run: Run, source: Source, writer: Any = None) -> Any:
        """Predict every batch; see ``PredictLoop``."""
        task: Any = run.task
        with task.calls.staged(run, "predict"):
            task.calls.emit("on_predict_start")
            task.calls.emit("on_predict_epoch_start")
            made = super().run(run, source, writer)
            task.calls.emit("on_predict_epoch_end")
            task.calls.emit("on_predict_end")
        return made
