"""EvalLoop: one evaluation over one or several data sets, leaving the task and the random streams
as they were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch

from loopkit import rng
from loopkit.data.micro_batches import Source
from loopkit.data.nested import transfer_fn
from loopkit.errors import TaskError
from loopkit.metrics.evaluation import Evaluation
from loopkit.optim.schedule_free import evaluation_weights
from loopkit.run import Run
from loopkit.task import name_of


@contextmanager
def evaluation_mode(run: Run) -> Iterator[None]:
    """Inside: ``eval()`` mode, weights to evaluate, no gradients; afterwards all of it and every
    stream as before.
    """
    modes = [(module, module.training) for module in run.task.modules()]
    streams = rng.get_state(run.strategy.device)
    run.task.eval()
    try:
        with evaluation_weights(run.optimizers.values()), torch.no_grad():
            yield
    finally:
        run.strategy.reshard()
        for module, training in modes:
            module.training = training
        rng.set_state(streams, run.strategy.device)


class EvalLoop:
    """One evaluation: every sample once, metrics from ``Task.metrics`` and
    ``Task.compute_metrics``.
    """

    def run(self, run: Run, data: Mapping[str, Source]) -> dict[str, float]:
        """Evaluate on each data set of ``data``; the one called "" has no name of its own.

        Returns:
            Scalars by full name: ``eval/loss``, ``eval/accuracy``, or ``eval/<set>/accuracy``.
        """
        if run.events.eval_start is not None:
            run.events.eval_start(run)
        began, samples, world = perf_counter(), 0.0, run.strategy.dp
        metrics: dict[str, float] = {}
        arrays: dict[str, Any] = {}
        with evaluation_mode(run):
            for name, source in data.items():
                evaluation = Evaluation(run.task, run.strategy.device, world)
                samples += self.measure(run, source, evaluation)
                found, shaped = evaluation.compute(f"eval/{name}/" if name else "eval/")
                metrics |= found
                arrays |= shaped
        seconds = perf_counter() - began
        (samples,) = world.all_reduce_sum(samples)
        metrics |= {"eval/runtime": seconds, "eval/samples_per_second": samples / seconds}
        metrics = world.broadcast_object(
            metrics
        )  # what is decided by them must be the same everywhere
        run.loggers.log_arrays(arrays, run.progress.step)
        return metrics

    def measure(self, run: Run, source: Source, evaluation: Evaluation) -> int:
        """Feed this rank's batches of ``source`` to ``evaluation``; returns how many samples there
        were.

        Raises:
            TaskError: ``eval_step`` returned no mapping.
        """
        strategy, seen = run.strategy, run.events.eval_step_end
        step = strategy.step_fn("eval_step")
        move = transfer_fn(strategy.device, strategy.settings.precision.storage)
        samples = 0
        for number, (batch, size, *_) in enumerate(source.open(0, 0)):
            if not size and not strategy.collective_forward:
                continue
            if run.seed is not None:
                turn = number * strategy.dp.size + strategy.dp.rank
                rng.seed_all(rng.mix(run.seed, turn, 3), strategy.device)
            placed = batch if move is None else move(batch)
            with strategy.forward_context or nullcontext():
                outputs = step(placed)
            if not isinstance(outputs, Mapping):
                raise TaskError(
                    f"{name_of(run.task)}.eval_step returned {type(outputs).__name__}: return a "
                    f"dict "
                    "with 'loss', and what the metrics ask for by name"
                )
            if size:
                evaluation.update(outputs, size, run.task._logged)
            run.task._logged.clear()
            samples += size
            if seen is not None and size:
                seen(run, outputs)
        return samples
