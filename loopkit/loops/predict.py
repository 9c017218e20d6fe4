"""PredictLoop: one pass of predictions, in the order of the data, each sample once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from loopkit.data.sources import Source
from loopkit.loops.evaluate import evaluation_mode, seeded_batches
from loopkit.metrics.sync import interleave_ranks
from loopkit.nested import concatenate, to_cpu
from loopkit.run import Run

logger = logging.getLogger(__name__)
Writer = Callable[[Any], None]


class PredictLoop:
    """One pass over the data with ``Task.predict_step``."""

    def run(self, run: Run, source: Source, writer: Writer | None = None) -> Any:
        """Predict every batch.

        Args:
            run: the run.
            source: the data.
            writer: a function that gets each batch's predictions, on the CPU, in order, on rank 0.
                Predictions are then neither kept nor returned.

        Returns:
            The predictions of all batches, concatenated along the samples: tensors are
            concatenated, lists are chained, dicts and tuples keep their form. Where that is
            impossible, a list with one entry per batch. None with a writer.
        """
        strategy, step_end = run.strategy, run.events.predict_step_end
        step_fn, world = strategy.step_fn("predict_step"), strategy.dp
        # Ranks with data of their own have different numbers of batches: one exchange at the end.
        streams = writer is not None and not source.uneven
        kept: list[Any] = []
        batches = 0
        with evaluation_mode(run):
            for batch, size in seeded_batches(run, source, stream=4):
                outputs = None
                if size or strategy.collective_forward:
                    with run.task.log_collector, strategy.forward_context or nullcontext():
                        outputs = step_fn(batch)
                batches += 1
                if step_end is not None and size:
                    step_end(run, outputs)
                local = [to_cpu(outputs)] if size else []
                if writer is not None and streams:
                    for part in interleave_ranks(world.gather_object(local)):
                        writer(part)
                else:
                    kept += local
        logger.info("predicted %d batches on this rank", batches)
        if writer is None:
            return concatenate_outputs(interleave_ranks(world.all_gather_object(kept)))
        for part in interleave_ranks(world.gather_object(kept)):
            writer(part)
        return None


def concatenate_outputs(parts: list[Any]) -> Any:
    """Return the outputs of batches as one: tensors along dimension 0, lists in a chain.

    Dicts and tuples keep their form. Tensors of different shapes stay a list.
    """
    return concatenate(parts, _joined_tensors) if parts else []


def _joined_tensors(parts: list[Tensor]) -> Any:
    same = all(part.ndim and part.shape[1:] == parts[0].shape[1:] for part in parts)
    return torch.cat(parts) if same else parts
