"""PredictLoop: one pass of predictions, in the order of the data, each sample once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from loopkit.data.micro_batches import Source
from loopkit.data.nested import map_tensors
from loopkit.loops.evaluate import evaluation_mode, seeded_batches
from loopkit.metrics.sync import interleave_ranks
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
                local = [map_tensors(_to_cpu, outputs)] if size else []
                if writer is not None and streams:
                    for part in interleave_ranks(world.gather_object(local)):
                        writer(part)
                else:
                    kept += local
        logger.info("predicted %d batches on this rank", batches)
        if writer is None:
            return concatenate(interleave_ranks(world.all_gather_object(kept)))
        for part in interleave_ranks(world.gather_object(kept)):
            writer(part)
        return None


def concatenate(parts: list[Any]) -> Any:
    """Concatenate the outputs of batches: tensors along dimension 0, lists in a chain.

    Dicts and tuples keep their form. Tensors of different shapes stay a list.
    """
    if not parts:
        return []
    first = parts[0]
    if isinstance(first, Tensor):
        if all(part.ndim and part.shape[1:] == first.shape[1:] for part in parts):
            return torch.cat(parts)
        return parts
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        joined = [concatenate(list(column)) for column in zip(*parts)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    return parts


def _to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()
