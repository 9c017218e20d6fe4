"""EvalLoop: one evaluation over one or several data sets; it leaves the task as it was."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any, TypeVar

import torch

from loopkit import rng
from loopkit.data.sources import Source
from loopkit.data.transfer import transfer_fn
from loopkit.errors import TaskError
from loopkit.metrics.evaluation import Evaluation
from loopkit.optim.schedule_free import evaluation_weights
from loopkit.preserve import preserved_modes
from loopkit.run import Interrupted, Run
from loopkit.task import eval_step_of, measured_set, name_of

logger = logging.getLogger(__name__)
T = TypeVar("T")


@contextmanager
def evaluation_mode(run: Run) -> Iterator[None]:
    """Inside, the task is in eval mode with its evaluation weights, and no gradients are made."""
    with preserved_modes(run.task, run.strategy.device):
        run.task.eval()
        try:
            with evaluation_weights(run.optimizers.values()), torch.no_grad():
                yield
        finally:
            run.strategy.reshard()


class EvalLoop:
    """One evaluation: every sample once, metrics of ``Task.metrics`` and ``compute_metrics``."""

    def run(self, run: Run, data: Mapping[str, Source]) -> dict[str, float]:
        """Evaluate on each data set.

        Args:
            run: the run.
            data: the data sets by name. The name "" adds nothing to the names of the metrics.

        Returns:
            Scalars by full name: ``eval/loss``, ``eval/accuracy``, or ``eval/<set>/accuracy``. In
            a test they begin with ``test/``.
        """
        kind = run.task.eval_set or "eval"
        if run.events.eval_start is not None:
            run.events.eval_start(run)
        began, samples, dp = perf_counter(), 0.0, run.strategy.dp
        metrics: dict[str, float] = {}
        arrays: dict[str, Any] = {}
        with evaluation_mode(run):
            for name, source in data.items():
                with measured_set(run.task, f"{kind}/{name}" if name else kind):
                    evaluation = Evaluation(run.task, run.strategy.device, dp)
                    samples += self.measure(run, source, evaluation)
                    scalars, shaped = evaluation.compute(f"{run.task.eval_set}/")
                run.record.class_names = evaluation.class_names
                metrics |= scalars
                arrays |= shaped
        seconds = perf_counter() - began
        (samples,) = dp.all_reduce_sum(samples)
        metrics |= {
            f"{kind}/runtime": seconds,
            f"{kind}/samples_per_second": samples / seconds,
        }
        metrics = dp.broadcast_object(metrics)  # decisions by them must be the same on all ranks
        run.loggers.log_arrays(arrays, run.progress.step)
        logger.info("evaluated %d samples in %.1f s", samples, seconds)
        return metrics

    def measure(self, run: Run, source: Source, evaluation: Evaluation) -> int:
        """Give this rank's batches of ``source`` to ``evaluation``.

        Returns:
            The number of samples of this rank.

        Raises:
            TaskError: the step returned no mapping.
            Interrupted: a signal came.
        """
        strategy, collector = run.strategy, run.task.log_collector
        method = eval_step_of(run.task)
        step_fn, step_end = strategy.step_fn(method), run.events.eval_step_end
        samples = 0
        for batch, size in interruptible(run, source, seeded_batches(run, source, stream=3)):
            if not size and not strategy.collective_forward:
                continue
            with collector as logged, strategy.forward_context or nullcontext():
                outputs = step_fn(batch)
            if not isinstance(outputs, Mapping):
                raise TaskError(
                    f"{name_of(run.task)}.{method} returned {type(outputs).__name__}: return a "
                    "dict with 'loss', and the arguments of the metrics by name"
                )
            if size:
                evaluation.update(outputs, size, logged)
                samples += size
                if step_end is not None:
                    step_end(run, outputs)
        return samples


def interruptible(run: Run, source: Source, batches: Iterator[T]) -> Iterator[T]:
    """Yield ``batches`` until a signal asks for the end of the run.

    Raises:
        Interrupted: it does. All ranks raise it before the same batch.
    """
    coordinator, alike = run.coordinator, not source.uneven
    for batch in batches:  # after the fetch, so that a complete evaluation stays one
        if coordinator.interrupts_evaluation(run, alike=alike):
            raise Interrupted
        yield batch


def seeded_batches(run: Run, source: Source, *, stream: int) -> Iterator[tuple[Any, int]]:
    """Yield this rank's batches on the device, each with its number of samples.

    The size is 0 where this rank has no data and others have. Before each batch, all random
    generators are seeded with (seed, number of the batch, ``stream``).
    """
    strategy = run.strategy
    dp, move = strategy.dp, transfer_fn(strategy.device, strategy.settings.precision.storage)
    for number, (batch, size, *_) in enumerate(source.open(0, 0)):
        if run.seed is not None:
            seed = rng.mix(run.seed, number * dp.size + dp.rank, stream)
            rng.seed_all(seed, strategy.device)
        yield (batch if move is None else move(batch)), size
