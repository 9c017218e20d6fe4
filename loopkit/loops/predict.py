"""PredictLoop: one pass of predictions, in data set order, each sample once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from loopkit import rng
from loopkit.data.micro_batches import Source
from loopkit.data.nested import map_tensors, transfer_fn
from loopkit.loops.evaluate import evaluation_mode
from loopkit.metrics.sync import interleave_ranks
from loopkit.run import Run

Writer = Callable[[Any], None]


class PredictLoop:
    """One pass over the data with ``Task.predict_step``."""

    def run(self, run: Run, source: Source, writer: Writer | None = None) -> Any:
        """Predict every batch.

        Args:
            writer: gets each batch's predictions, on the CPU, in order, on the first rank; then
                nothing is kept or returned.

        Returns:
            The batches' predictions joined along the samples: tensors concatenated, lists chained,
            through dicts and tuples; a list per batch where that is impossible (None with a
            writer).
        """
        strategy, seen = run.strategy, run.events.predict_step_end
        step = strategy.step_fn("predict_step")
        move = transfer_fn(strategy.device, strategy.settings.precision.storage)
        kept: list[Any] = []
        world = strategy.dp
        with evaluation_mode(run):
            for number, (batch, size, *_) in enumerate(source.open(0, 0)):
                if run.seed is not None:
                    turn = number * world.size + world.rank
                    rng.seed_all(rng.mix(run.seed, turn, 4), strategy.device)
                outputs = None
                if size or strategy.collective_forward:
                    placed = batch if move is None else move(batch)
                    with strategy.forward_context or nullcontext():
                        outputs = step(placed)
                if seen is not None and size:
                    seen(run, outputs)
                mine = [map_tensors(lambda tensor: tensor.detach().cpu(), outputs)] if size else []
                if writer is None or source.uneven:  # ranks then take different numbers of turns
                    kept += mine
                    continue
                for part in interleave_ranks(world.gather_object(mine)):
                    writer(part)
        if writer is None:
            return join(interleave_ranks(world.all_gather_object(kept)))
        for part in interleave_ranks(world.gather_object(kept)):
            writer(part)
        return None


def join(parts: list[Any]) -> Any:
    """Batches' outputs as one: tensors along their first dimension, lists chained, dicts and tuples
    inside out.
    """
    if not parts:
        return []
    first = parts[0]
    if isinstance(first, Tensor):
        if all(part.ndim and part.shape[1:] == first.shape[1:] for part in parts):
            return torch.cat(parts)
        return parts
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        joined = [join(list(column)) for column in zip(*parts)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    if isinstance(first, list):
        return [item for part in parts for item in part]
    return parts
