"""PredictLoop: one pass of predictions, in the order of the data, each sample once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from typing import Any

from loopkit.data.sources import Source
from loopkit.loops.evaluate import evaluation_mode, seeded_batches
from loopkit.metrics.outputs import (
    BatchOutput,
    check_outputs,
    entries_by_sample,
    join_outputs,
    on_cpu,
)
from loopkit.metrics.sync import interleave_ranks
from loopkit.run import Run
from loopkit.task import name_of

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
                Predictions are then neither kept nor returned. A tuple with an entry for each
                sample comes as a list.

        Returns:
            The predictions of all samples, joined as ``loopkit.metrics.outputs.join_outputs`` says.
            None with a writer.

        Raises:
            TaskError: the predictions of two batches have different forms, or a part of them has
                another length than its batch.
        """
        strategy, step_end = run.strategy, run.events.predict_step_end
        step_fn, world = strategy.step_fn("predict_step"), strategy.dp
        # Ranks with data of their own have different numbers of batches: one exchange at the end.
        streams = writer is not None and not source.uneven
        step = f"{name_of(run.task)}.predict_step"
        kept: list[BatchOutput] = []
        with evaluation_mode(run):
            batches = seeded_batches(run, source, stream=4)
            for number, (batch, size) in zip(count(world.rank, world.size), batches):
                outputs = None
                if size or strategy.collective_forward:
                    with run.task.log_collector, strategy.forward_context or nullcontext():
                        outputs = step_fn(batch)
                if step_end is not None and size:
                    step_end(run, outputs)
                if size:
                    kept.append(BatchOutput(on_cpu(outputs), size))
                    if writer is None:
                        check_outputs(kept[0], kept[-1], (world.rank, number), step)
                if writer is not None and streams:
                    for part in interleave_ranks(world.gather_object(kept)):
                        writer(entries_by_sample(part))
                    kept.clear()
        logger.info("predicted all batches of this rank")
        if writer is None:
            return join_outputs(interleave_ranks(world.all_gather_object(kept)), step)
        for part in interleave_ranks(world.gather_object(kept)):
            writer(entries_by_sample(part))
        return None
